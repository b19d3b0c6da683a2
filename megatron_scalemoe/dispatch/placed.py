"""Dispatch under a plan: logical experts become slots, and each expert's tokens are split over its copies from this step's counts.

ScaleMoE (Choi et al., PACT'25) replicates hot experts, too, but sends a token to a copy on its own rank, or else to the last one listed.
Here all ranks gather the counts of the step and compute the same split (`split.split_tokens`), which makes the largest rank load the
smallest possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.ops.ragged import naming_failure
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import split_tokens


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LayerPlacement:
    """One layer of a plan for the ranks that dispatch it.

    slots_P: int [P], the logical expert of each slot, or EMPTY; rank r of num_ranks holds the slots r*P/G up to (r+1)*P/G.
    node_of_rank_G: int [G]; the split prefers copies of the own node.
    """

    slots_P: np.ndarray
    num_ranks: int
    node_of_rank_G: np.ndarray


class PlacedDispatcher(Dispatcher):
    """A dispatcher whose experts are the slots of a placement: `expand` returns the rows and counts of this rank's P/G slots.

    inner: carries the rows, made for P experts. rank: this rank in the dispatch group, in which each of the placement's ranks stands for
    `expert_tp_size` consecutive ones. gather_counts: every rank's int64 [E] -> [ranks of the group, E], the same on all.

    With replicas `prepare` waits for the counts of all ranks, and on CUDA for the device: which copy a token goes to depends on them. A
    plan without replicas needs neither. Immutable: a new plan needs a new dispatcher.
    """

    def __init__(
        self,
        inner: Dispatcher,
        placement: LayerPlacement,
        rank: int,
        expert_tp_size: int,
        gather_counts: Callable[[Tensor], Tensor],
        device: torch.device,
    ):
        self.placement, self.rank, self.expert_tp_size = placement, rank, expert_tp_size
        self._inner, self._gather_counts = inner, gather_counts
        used_P = placement.slots_P != EMPTY
        copies_E = np.bincount(placement.slots_P[used_P])
        several_E = np.flatnonzero(copies_E > 1)
        # copies of one expert side by side, in the order in which its tokens fill them
        slot_C = np.flatnonzero(used_P & (copies_E[placement.slots_P] > 1))
        self._slot_C = slot_C[np.argsort(placement.slots_P[slot_C], kind="stable")]
        column_C = np.searchsorted(several_E, placement.slots_P[self._slot_C])
        self._first_of_expert_C = np.searchsorted(column_C, column_C)
        as_index = lambda array: torch.from_numpy(array.astype(np.int64)).to(device)  # noqa: E731
        self._expert_P, self._used_P = as_index(np.maximum(placement.slots_P, 0)), torch.from_numpy(used_P).to(device)
        self._several_X, self._slots, self._column_C = as_index(several_E), as_index(self._slot_C), as_index(column_C)

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        slot_map_TP = routing_map_TE.index_select(1, self._expert_P) & self._used_P
        if self._slot_C.size:
            start_C, end_C = self._own_share(routing_map_TE)
            # which of this rank's tokens for the expert it is
            position_TC = (routing_map_TE.index_select(1, self._several_X).cumsum(0) - 1).index_select(1, self._column_C)
            here_TC = (position_TC >= start_C) & (position_TC < end_C)
            slot_map_TP[:, self._slots] &= here_TC
        return self._inner.prepare(x_TD, probs_TE.index_select(1, self._expert_P), slot_map_TP)

    def _own_share(self, routing_map_TE: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [C], [C]: the first of this rank's tokens that goes to each copy of its expert, and the first that no longer does."""
        block, member = divmod(self.rank, self.expert_tp_size)
        counts_GTE = self._gather_counts(routing_map_TE.sum(0)).cpu().numpy().reshape(self.placement.num_ranks, self.expert_tp_size, -1)
        tokens_GP = split_tokens(counts_GTE.sum(1), self.placement.slots_P, self.placement.num_ranks, self.placement.node_of_rank_G)
        tokens_C = tokens_GP[block, self._slot_C]
        before_C = np.cumsum(tokens_C) - tokens_C
        start_C = before_C - before_C[self._first_of_expert_C]
        # an expert-tensor-parallel block's ranks share its part: their tokens follow each other
        earlier_C = counts_GTE[block, :member].sum(0)[self.placement.slots_P[self._slot_C]]
        bounds = np.stack([start_C, start_C + tokens_C]) - earlier_C
        return tuple(torch.from_numpy(bounds).to(routing_map_TE.device))

    def exchange(self, flight: InFlight) -> InFlight:
        return self._inner.exchange(flight)

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self._inner.expand(flight)

    def reduce(self, rows_RD: Tensor, metadata: Any) -> Tensor:
        return self._inner.reduce(rows_RD, metadata)

    def exchange_back(self, x: Tensor, metadata: Any) -> Tensor:
        return self._inner.exchange_back(x, metadata)

    def restore(self, x: Tensor, metadata: Any) -> Tensor:
        return self._inner.restore(x, metadata)

    def rows_sent(self, metadata: Any) -> RowsSent:
        return self._inner.rows_sent(metadata)


def gather_by_collective(group: dist.ProcessGroup, counts_E: Tensor) -> Tensor:
    """Every rank's counts, int64 [E] -> [G, E]."""
    counts = counts_E.new_empty(group.size() * counts_E.numel())
    with naming_failure("count gathering", group):
        dist.all_gather_into_tensor(counts, counts_E, group=group)
    return counts.view(group.size(), -1)
