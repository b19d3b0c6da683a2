"""Records the routing while training goes on: counts stay on the device, and come to the host once per interval, of all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.balance.model import MoESizes, Router
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.rounding import whole_tokens
from megatron_scalemoe.traffic.trace import RoutingTrace, save_trace

TRACE_FILE, _MOST_RECORDED = "routing.npz", 1000


class RoutingRecorder:
    """Counts of this pipeline stage's `routers`. A recorded step is the mean micro-batch of the iterations between two `mark`s.

    No host synchronisation but in `gather`.
    """

    def __init__(self, routers: list[Router], groups: Groups, sizes: MoESizes):
        self._routers, self._groups = routers, groups
        self._meta = {"topk": sizes.topk, "hidden_size": sizes.hidden_size, "ffn_hidden_size": sizes.ffn_hidden_size}
        self._last_E = self._counted()
        self._windows: list[tuple[int, int, list[torch.Tensor]]] = []  # last iteration, number of micro-batches, counts [E] of each layer
        self._micro_batches = 0

    def end_step(self, micro_batches: int) -> None:
        """Call at the end of each iteration, with its number of micro-batches: a ramp-up of the batch changes it."""
        self._micro_batches += micro_batches

    def mark(self, iteration: int) -> None:
        """End a recorded step here, after this iteration; nothing if it has none."""
        if not self._micro_batches:
            return
        counted = self._counted()
        counts_E = [now_E - last_E for now_E, last_E in zip(counted, self._last_E, strict=True)]
        self._windows.append((iteration, self._micro_batches, counts_E))
        self._last_E, self._micro_batches = counted, 0

    def gather(self) -> RoutingTrace | None:
        """What was recorded since the last call, of all ranks of this pipeline stage; None if nothing was. Collective.

        Rows of the trace are positions in the expert-parallel group; several such groups are averaged.
        """
        windows, self._windows = self._windows, []
        if not windows or not self._routers:
            return None
        ep, stage = self._groups.ep, self._groups.stage
        windows_SLE = torch.stack([torch.stack(counts) for _, _, counts in windows])
        counts_SLGE = windows_SLE.new_zeros(*windows_SLE.shape[:2], ep.size(), windows_SLE.shape[2])
        counts_SLGE[:, :, ep.rank()] = windows_SLE
        dist.all_reduce(counts_SLGE, group=stage)
        ep_groups = stage.size() // ep.size() // self._groups.expert_tp.size()
        parts_S = np.array([micro_batches for _, micro_batches, _ in windows]) * ep_groups
        counts = whole_tokens(counts_SLGE.cpu().numpy() / parts_S[:, None, None, None])
        iterations = [iteration for iteration, _, _ in windows]
        return RoutingTrace(counts, None, {**self._meta, "iterations": iterations})

    def _counted(self) -> list[torch.Tensor]:
        """int64 [E] of each layer: since the start."""
        return [router.tokens_per_expert.clone() for router in self._routers]


class TraceFile:
    """The latest recorded steps of all pipeline stages, as a file in `directory` that the planner's commands read.

    rows: of the MoE layers of this rank, of `num_rows` in the model.
    """

    def __init__(self, directory: str, rows: Sequence[int], num_rows: int, groups: Groups):
        self._path, self._rows, self._num_rows, self._groups = Path(directory) / TRACE_FILE, list(rows), num_rows, groups
        self._steps: RoutingTrace | None = None

    def add(self, part: RoutingTrace | None) -> str:
        """Add what this stage has recorded, None if nothing, and let the first rank write the file anew. Collective over pipeline ranks.

        Why the file could not be written, on that rank; "" if it was.
        """
        whole = self._of_all_stages(part)
        if whole is None:
            return ""
        self._steps = joined(self._steps, whole)
        if self._groups.world.rank() == 0:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                save_trace(self._steps, self._path, force=True)
            except (ScaleMoEError, OSError) as error:
                return str(error)
        return ""

    def _of_all_stages(self, part: RoutingTrace | None) -> RoutingTrace | None:
        """None if no stage has recorded anything; stages without MoE layers never do."""
        parts: list = [None] * self._groups.pp.size()
        dist.all_gather_object(parts, part and (self._rows, part), group=self._groups.pp)
        parts = [found for found in parts if found is not None]
        if not parts:
            return None
        some = parts[0][1]
        counts = np.zeros((some.num_steps, self._num_rows, some.num_ranks, some.num_experts), dtype=np.int32)
        for rows, trace in parts:
            counts[:, rows] = trace.counts
        return RoutingTrace(counts, None, some.meta)


def joined(earlier: RoutingTrace | None, later: RoutingTrace) -> RoutingTrace:
    """Both one after the other, the latest steps of them."""
    if earlier is None:
        return later
    counts = np.concatenate([earlier.counts, later.counts])[-_MOST_RECORDED:]
    iterations = [*earlier.iterations, *later.iterations][-_MOST_RECORDED:]
    return RoutingTrace(counts, None, {**later.meta, "iterations": iterations})
