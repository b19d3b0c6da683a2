"""Replicas of experts: constructions, and their improvement."""
