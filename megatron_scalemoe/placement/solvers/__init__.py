"""Homes of experts: the search, and what it is compared with."""
