"""What a training loop may report about the MoE layers of its model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core import parallel_state

from megatron_scalemoe.integration.router import ScaleMoERouter
from megatron_scalemoe.routing.stats import max_over_mean


def mean_rank_load(model_chunks: Iterable[torch.nn.Module]) -> float | None:
    """Largest over mean rank load since the last call, averaged over this pipeline stage's MoE layers; None without a `ScaleMoERouter`.

    Sums the counts over the ranks that share the experts, so every rank must call it; one host synchronisation. Resets the counts.
    """
    routers = [module for chunk in model_chunks for module in chunk.modules() if isinstance(module, ScaleMoERouter)]
    if not routers:
        return None
    counts_LE = torch.stack([router.tokens_per_expert for router in routers])
    torch.distributed.all_reduce(counts_LE, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    for router in routers:
        router.tokens_per_expert.zero_()
    num_ranks = parallel_state.get_expert_model_parallel_world_size()
    return sum(max_over_mean(counts_E, num_ranks) for counts_E in counts_LE.cpu()) / len(routers)
