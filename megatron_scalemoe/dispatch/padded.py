"""The capacity-padded baseline (GShard, Tutel, DeepSpeed-MoE): every rank sends `capacity` rows to every expert, used or not."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.ops.permute import RowMap, permute, row_map, unpermute
from megatron_scalemoe.ops.ragged import naming_failure, ragged_all_to_all


@dataclasses.dataclass(frozen=True, slots=True)
class PaddedMetadata:
    """What `combine` needs: the map from tokens to kept rows in (expert, token) order, each kept row's slot, and the capacity."""

    kept: RowMap
    slot_N: Tensor
    capacity: int


class PaddedDispatcher(Dispatcher):
    """Dispatch over `group` with equal splits of experts x capacity rows.

    capacity_factor None: nothing is dropped, the capacity is the largest (source rank, expert) count of the step. Otherwise the capacity
    is ceil(factor x T x top_k / E) and the tokens beyond it are dropped in token order, as GShard does.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, top_k: int, capacity_factor: float | None = None):
        assert num_experts % group.size() == 0, (num_experts, group.size())
        self.group = group
        self.num_experts = num_experts
        self.num_local_experts = num_experts // group.size()
        self.top_k = top_k
        self.capacity_factor = capacity_factor

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        """As the base class, but waits until the ranks agree on the capacity: the slots depend on it."""
        capacity = self._capacity(routing_map_TE)
        position_TE = routing_map_TE.cumsum(0) - 1
        kept_ET = (routing_map_TE & (position_TE < capacity)).T
        expert_N, token_N = kept_ET.nonzero().unbind(1)
        slot_N = expert_N * capacity + position_TE[token_N, expert_N]
        kept = row_map(token_N, x_TD.shape[0])
        num_slots = self.num_experts * capacity
        x_SD = x_TD.new_zeros(num_slots, x_TD.shape[1]).index_copy(0, slot_N, permute(x_TD, kept))
        probs_N = probs_TE.reshape(-1).index_select(0, token_N * self.num_experts + expert_N)
        probs_S = probs_TE.new_zeros(num_slots).index_copy(0, slot_N, probs_N)
        return InFlight(x_SD, probs_S[:, None], PaddedMetadata(kept, slot_N, capacity))

    def exchange(self, flight: InFlight) -> InFlight:
        return InFlight(self._all_to_all(flight.x, flight.state), self._all_to_all(flight.probs, flight.state), flight.state)

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, PaddedMetadata]:
        metadata: PaddedMetadata = flight.state
        rows = self._by_expert(flight.x, metadata)
        per_expert = self.group.size() * metadata.capacity
        tokens_per_expert = torch.full((self.num_local_experts,), per_expert, dtype=torch.int64)
        return rows, tokens_per_expert, self._by_expert(flight.probs, metadata).reshape(-1), metadata

    def reduce(self, rows_RD: Tensor, metadata: PaddedMetadata) -> Tensor:
        blocks = rows_RD.reshape(self.num_local_experts, self.group.size(), metadata.capacity, rows_RD.shape[1])
        return blocks.transpose(0, 1).reshape(rows_RD.shape)

    def exchange_back(self, x: Tensor, metadata: PaddedMetadata) -> Tensor:
        return self._all_to_all(x, metadata)

    def restore(self, x: Tensor, metadata: PaddedMetadata) -> Tensor:
        return unpermute(x.index_select(0, metadata.slot_N), metadata.kept)

    def rows_sent(self, metadata: PaddedMetadata) -> RowsSent:
        stayed = self.num_local_experts * metadata.capacity
        rows = stayed * self.group.size()
        return RowsSent(stayed, rows - stayed, padding=rows - metadata.slot_N.numel())

    def _capacity(self, routing_map_TE: Tensor) -> int:
        """Rows per (source rank, expert), agreed by all ranks."""
        if self.capacity_factor is None:
            capacity = routing_map_TE.sum(0).max()
        else:
            share = self.capacity_factor * routing_map_TE.shape[0] * self.top_k / self.num_experts
            capacity = torch.tensor(math.ceil(share), device=routing_map_TE.device)
        with naming_failure("capacity agreement", self.group):
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.group)
        return int(capacity)

    def _all_to_all(self, x: Tensor, metadata: PaddedMetadata) -> Tensor:
        splits = [self.num_local_experts * metadata.capacity] * self.group.size()
        return ragged_all_to_all(x, splits, splits, self.group)

    def _by_expert(self, x: Tensor, metadata: PaddedMetadata) -> Tensor:
        """Received blocks from (source rank, expert, slot) to (expert, source rank, slot) order."""
        blocks = x.reshape(self.group.size(), self.num_local_experts, metadata.capacity, x.shape[1])
        return blocks.transpose(0, 1).reshape(x.shape)
