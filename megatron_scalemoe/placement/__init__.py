"""Where experts should live: solvers, lower bounds, migration between plans, and when to replan."""
