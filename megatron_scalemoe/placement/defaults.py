"""What planning does when nothing else is asked for. Imports nothing, so that the command line can name it quickly."""

SOLVER = "memetic"
# Seconds: 58 layers of 256 experts on 64 ranks are then planned, files and prices included, in less than ten on two cores.
TIME_BUDGET_S = 8.0
BASELINE = "contiguous"
