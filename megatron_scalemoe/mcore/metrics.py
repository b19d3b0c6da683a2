"""What a training loop may report about the MoE layers of its model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import track_moe_metrics
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.mcore.moe_layer import ScaleMoELayer
from megatron_scalemoe.ops.token_counts import max_over_mean

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


def mean_rank_load(model_chunks: Iterable[torch.nn.Module]) -> float | None:
    """Largest over mean rank load since the last call, averaged over this pipeline stage's MoE layers; None without a `ScaleMoELayer`.

    A rank's load is the rows that its experts computed, whatever the plan. Sums over the ranks that share the experts, so every rank must
    call it; one host synchronisation.
    """
    dispatchers = [module.token_dispatcher for chunk in model_chunks for module in chunk.modules() if isinstance(module, ScaleMoELayer)]
    if not dispatchers:
        return None
    rows_L = [dispatcher.rows_computed - dispatcher.rows_reported for dispatcher in dispatchers]
    for dispatcher in dispatchers:
        dispatcher.rows_reported = dispatcher.rows_computed
    load_LG = load_of_ranks(torch.tensor([rows_L]))[0]
    return sum(max_over_mean(load_G, load_G.numel()) for load_G in load_LG) / len(dispatchers)


def load_of_ranks(rows_SL: torch.Tensor) -> torch.Tensor:
    """int64 [S, L] rows of this rank, on the host -> [S, L, G]: of each position in the expert-parallel group, all such groups together.

    Collective over the pipeline stage.
    """
    ranks, rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
    load_SLG = torch.zeros(*rows_SL.shape, ranks, dtype=torch.int64, device=torch.cuda.current_device())
    load_SLG[:, :, rank] = rows_SL.to(load_SLG.device)
    torch.distributed.all_reduce(load_SLG, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    return load_SLG.cpu()
