"""Which data-parallel rank computes which sequence of a global batch."""
