"""What a Megatron MoE layer is made of, with ScaleMoE: the layer and its router, the token dispatcher, the experts and their state."""
