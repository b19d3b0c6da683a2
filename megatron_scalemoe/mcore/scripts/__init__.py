"""ScaleMoE in Megatron-LM's own training scripts."""
