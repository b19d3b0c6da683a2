"""The commands that plan, compare, replay and price placements."""
