"""Ranks that die, hang or disagree, found and named."""
