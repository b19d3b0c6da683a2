"""Where ScaleMoE meets Megatron-Core: the only package that imports `megatron`."""
