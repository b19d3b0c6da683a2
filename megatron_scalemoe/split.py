"""Per-step replica split: which copy of its expert each token goes to, from exact counts."""
