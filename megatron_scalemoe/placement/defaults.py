"""What planning does when nothing else is asked for. Imports nothing, so that the command line can name it quickly."""

SOLVER = "local_search"
# Seconds after which a plan is made of what was found by then. Searches end by themselves, in a few seconds: a limit, not a target.
TIME_BUDGET_S = 60.0
BASELINE = "contiguous"
