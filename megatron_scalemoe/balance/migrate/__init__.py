"""Homes of experts that move, with all their state, or not at all."""
