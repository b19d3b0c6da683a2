"""Replaying a trace under a plan, a topology and a cost model."""
