"""What the two halves meet in: which expert lives in which slot, and the split of a step's tokens over copies."""
