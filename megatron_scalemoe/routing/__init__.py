"""Routing: statistics of what the router chose, and forced routing for benchmarks."""
