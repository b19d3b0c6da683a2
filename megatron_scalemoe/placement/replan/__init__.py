"""The next plan of a running job: what it is, when it pays, and the process that finds it."""
