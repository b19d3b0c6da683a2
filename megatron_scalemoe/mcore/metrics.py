"""The auxiliary losses of a model's routers, for training loops of one's own."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig

# what Megatron's routers call each of their losses
_AUX_LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


def mean_aux_losses(config: TransformerConfig, num_micro_batches: int) -> dict[str, float]:
    """The routers' auxiliary losses by Megatron's names, averaged over MoE layers and the `num_micro_batches` since the last call.

    Works for stock and our routers. Every rank must call it; resets Megatron's tracker.
    """
    types = config.moe_router_load_balancing_type
    types = [types] if isinstance(types, str) else types
    coefficients = config.moe_aux_loss_coeff if isinstance(config.moe_aux_loss_coeff, list) else [config.moe_aux_loss_coeff] * len(types)
    names = [
        _AUX_LOSS_NAMES[kind] for kind, coefficient in zip(types, coefficients, strict=True) if kind in _AUX_LOSS_NAMES and coefficient
    ]
    names += ["z_loss"] if config.moe_z_loss_coeff else []
    losses: dict[str, torch.Tensor] = {}
    track_moe_metrics(
        1 / num_micro_batches,
        iteration=0,  # used for a TensorBoard writer only
        total_loss_dict=losses,
        force_initialize=True,  # a pipeline stage without MoE layers takes part in the sum, too
        track_names=names,
        num_layers=config.num_layers,
        moe_layer_freq=config.moe_layer_freq,
    )
    return {name: float(loss) for name, loss in losses.items()}
