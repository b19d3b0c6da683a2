"""Records the routing while training goes on: counts stay on the device, and come to the host once per interval, of all ranks together."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_scalemoe.mcore.router import ScaleMoERouter
from megatron_scalemoe.traffic.trace import RoutingTrace


class RoutingRecorder:
    """Counts of this pipeline stage's `routers`. A recorded step is the mean micro-batch of the iterations between two `mark`s.

    No host synchronisation but in `gather`.
    """

    def __init__(self, routers: list[ScaleMoERouter], micro_batches: int, meta: dict):
        self._routers, self._micro_batches, self._meta = routers, micro_batches, meta
        self._last_E = self._counted()
        self._windows: list[tuple[int, int, list[torch.Tensor]]] = []  # last iteration, number of iterations, counts [E] of each layer
        self._iterations = 0

    def end_step(self) -> None:
        """Call at the end of each iteration."""
        self._iterations += 1

    def mark(self, iteration: int) -> None:
        """End a recorded step here, after this iteration; nothing if it has none."""
        if not self._iterations:
            return
        counted = self._counted()
        self._windows.append((iteration, self._iterations, [now_E - last_E for now_E, last_E in zip(counted, self._last_E, strict=True)]))
        self._last_E, self._iterations = counted, 0

    def gather(self) -> RoutingTrace | None:
        """What was recorded since the last call, of all ranks of this pipeline stage; None if nothing was. Collective.

        Rows of the trace are positions in the expert-parallel group; several such groups are averaged.
        """
        if not self._windows or not self._routers:
            return None
        ranks, rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
        windows_SLE = torch.stack([torch.stack(counts) for _, _, counts in self._windows])
        counts_SLGE = windows_SLE.new_zeros(*windows_SLE.shape[:2], ranks, windows_SLE.shape[2])
        counts_SLGE[:, :, rank] = windows_SLE
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(counts_SLGE, group=stage)
        groups = stage.size() // ranks // parallel_state.get_expert_tensor_parallel_world_size()
        parts_S = np.array([length for _, length, _ in self._windows]) * self._micro_batches * groups
        counts = np.rint(counts_SLGE.cpu().numpy() / parts_S[:, None, None, None]).astype(np.int32)
        iterations = [iteration for iteration, _, _ in self._windows]
        self._windows = []
        return RoutingTrace(counts, None, {**self._meta, "iterations": iterations})

    def _counted(self) -> list[torch.Tensor]:
        """int64 [E] of each layer: since the start."""
        return [router.tokens_per_expert.clone() for router in self._routers]


def whole_trace(part: RoutingTrace | None, rows: list[int], num_rows: int) -> RoutingTrace | None:
    """The trace of all pipeline stages' MoE layers from each one's part, for its rows of `num_rows`. Collective over pipeline ranks.

    A stage without MoE layers has None; None if all have.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list = [None] * group.size()
    torch.distributed.all_gather_object(parts, part and (rows, part), group=group)
    parts = [found for found in parts if found is not None]
    if not parts:
        return None
    some = parts[0][1]
    counts = np.zeros((some.num_steps, num_rows, some.num_ranks, some.num_experts), dtype=np.int32)
    for some_rows, trace in parts:
        counts[:, some_rows] = trace.counts
    return RoutingTrace(counts, None, some.meta)


def joined(earlier: RoutingTrace | None, later: RoutingTrace, most_steps: int) -> RoutingTrace:
    """Both one after the other, the latest `most_steps` of them."""
    if earlier is None:
        return later
    counts = np.concatenate([earlier.counts, later.counts])[-most_steps:]
    iterations = [*earlier.iterations, *later.iterations][-most_steps:]
    return RoutingTrace(counts, None, {**later.meta, "iterations": iterations})
