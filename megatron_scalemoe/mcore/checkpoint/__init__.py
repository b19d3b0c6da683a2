"""Checkpoints in Megatron's format: saved, loaded, and checked against what was saved."""
