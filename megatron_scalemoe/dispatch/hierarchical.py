"""Dispatch over several hosts in two hops: between hosts a token goes once to each host with one of its experts, then on inside the host.

The first hop is between ranks with the same position in their hosts (rail-aligned, as in DeepEP), by a ragged collective; the second is
any dispatcher of the host's ranks, over shared memory for one. The way back takes the same hops: a host's partial sums of a token are added
up before they leave it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.dispatch.fused import repeat_per_shard
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher, Received
from megatron_scalemoe.ops.permute import RowMap, unpermute
from megatron_scalemoe.ops.ragged import Splits, ragged_all_to_all


@dataclasses.dataclass(frozen=True, slots=True)
class Inside:
    """A dispatch between `exchange` and `expand`: the inner dispatcher's state, and the way back between hosts.

    own_NK: the columns of the rows that this rank sent to its own host, `columns_per_host` for none.
    """

    inner: Any
    sent: RowMap
    splits: Splits
    own_NK: Tensor


class HierarchicalDispatcher(Dispatcher):
    """Dispatch over hosts of equally many ranks, which follow each other in the dispatch group, host by host.

    between: group of the ranks with this rank's position in their hosts, in the order of the hosts. position: the same of this rank, of
    `ranks_per_host`. inner: dispatcher of this host's ranks,
    made for all experts of the host and no expert tensor parallelism of its own. The other arguments as for `RaggedDispatcher`;
    `ranks_per_host` x the size of `between` is the size of the dispatch group.

    Rows of an expert are in (source's position in its host, host, token) order, and sums are rounded once more than in a flat dispatch.
    """

    def __init__(
        self,
        between: dist.ProcessGroup,
        ranks_per_host: int,
        position: int,
        inner: Dispatcher,
        num_experts: int,
        max_experts_per_token: int,
        expert_tp_size: int = 1,
    ):
        num_columns = num_experts * expert_tp_size
        assert num_columns % (between.size() * ranks_per_host) == 0, (num_columns, between.size(), ranks_per_host)
        self.between, self.position, self.inner, self.expert_tp_size = between, position, inner, expert_tp_size
        self.num_local_experts = num_columns // (between.size() * ranks_per_host)
        self.columns_per_host = num_columns // between.size()
        self._outer = RaggedDispatcher(between, num_columns, max_experts_per_token * expert_tp_size)

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        probs_TQ, routing_map_TQ = (repeat_per_shard(x, self.num_local_experts, self.expert_tp_size) for x in (probs_TE, routing_map_TE))
        return self._outer.prepare(x_TD, probs_TQ, routing_map_TQ)

    def exchange(self, flight: InFlight) -> InFlight:
        flight = self._outer.exchange(flight)
        received: Received = flight.state
        inner = self.inner.prepare(flight.x, *_by_column(flight.probs, received.experts_NK, self.columns_per_host))
        inner = self.inner.exchange(inner)
        own_NK = received.experts_NK.split(received.splits.output)[self.between.rank()].clone()  # a view would keep all rows in memory
        return dataclasses.replace(inner, state=Inside(inner.state, received.sent, received.splits, own_NK))

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, Inside]:
        inside: Inside = flight.state
        *expanded, metadata = self.inner.expand(dataclasses.replace(flight, state=inside.inner))
        return *expanded, dataclasses.replace(inside, inner=metadata)

    def reduce(self, rows_RD: Tensor, metadata: Inside) -> Tensor:
        return self.inner.reduce(rows_RD, metadata.inner)

    def exchange_back(self, x: Tensor, metadata: Inside) -> Tensor:
        x_ND = self.inner.restore(self.inner.exchange_back(x, metadata.inner), metadata.inner)
        return ragged_all_to_all(x_ND, metadata.splits.output, metadata.splits.input, self.between)

    def restore(self, x: Tensor, metadata: Inside) -> Tensor:
        return unpermute(x, metadata.sent)

    def rows_sent(self, metadata: Inside) -> RowsSent:
        crossed = sum(metadata.splits.input) - metadata.splits.input[self.between.rank()]
        stayed = (metadata.own_NK // self.num_local_experts == self.position).any(1).sum()  # what came from another host has not stayed
        return RowsSent(stayed, crossed + self.inner.rows_sent(metadata.inner).left)


def _by_column(probs_NK: Tensor, experts_NK: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """probs and routing map bool, both [N, num_columns], from lists of columns in which `num_columns` stands for none."""
    shape, column_NK = (experts_NK.shape[0], num_columns + 1), experts_NK.long()
    probs = probs_NK.new_zeros(shape).scatter(1, column_NK, probs_NK)
    routing_map = torch.zeros(shape, dtype=torch.bool, device=probs.device).scatter(1, column_NK, True)
    return probs[:, :num_columns], routing_map[:, :num_columns]
