"""Dispatch over a native transport: its two ops do all of the exchange, from tokens to expert rows and back.

Same rows, sums and gradients as `RaggedDispatcher`, bit for bit.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.ops import library
from megatron_scalemoe.ops.route import route
from megatron_scalemoe.ops.transports.registry import registered


@dataclasses.dataclass(frozen=True, slots=True)
class Arrived:
    """Between `exchange` and `expand`: rows are in their final order."""

    tokens_per_expert: Tensor
    metadata: FusedMetadata


@dataclasses.dataclass(frozen=True, slots=True)
class FusedMetadata:
    """What `combine` needs: the transport's own map, and the columns that each token went to."""

    map: Tensor
    experts_TK: Tensor


class FusedDispatcher(Dispatcher):
    """Dispatch over the transport with this number in `ops.transports.registry`, whose ranks hold `num_experts` experts in equal
    contiguous blocks.

    `expert_tp_size` and `max_experts_per_token` as for `RaggedDispatcher`. `alignment`: each expert's rows are padded with zeros to a
    multiple of it, which `tokens_per_expert` includes.

    On CUDA a transport returns as many rows as it has room for, and the counts on the device. With `spare_rows` they stay so, for experts
    that can do with it; otherwise `expand` waits for the counts and cuts the rows off that nobody sent.
    """

    def __init__(
        self,
        transport: int,
        num_experts: int,
        max_experts_per_token: int,
        expert_tp_size: int = 1,
        *,
        alignment: int = 1,
        spare_rows: bool = False,
    ):
        group_size = registered(transport).group.size()
        num_blocks = group_size // expert_tp_size
        assert num_blocks * expert_tp_size == group_size and num_experts % num_blocks == 0, (group_size, num_experts, expert_tp_size)
        self.transport = transport
        self.expert_tp_size = expert_tp_size
        self.num_local_experts = num_experts // num_blocks
        self.max_columns = min(max_experts_per_token, num_experts) * expert_tp_size
        self.alignment = alignment
        self.spare_rows = spare_rows

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        routing_map_TQ, probs_TQ = (repeat_per_shard(x, self.num_local_experts, self.expert_tp_size) for x in (routing_map_TE, probs_TE))
        experts_TK, probs_TK = route(routing_map_TQ, probs_TQ, self.max_columns)
        return InFlight(x_TD, probs_TK, experts_TK)

    def exchange(self, flight: InFlight) -> InFlight:
        experts_TK: Tensor = flight.state
        sent = flight.x.contiguous(), experts_TK, flight.probs.contiguous()
        rows, row_probs, tokens_per_expert, map = library.dispatch(self.transport, *sent, self.num_local_experts, self.alignment)
        return InFlight(rows, row_probs, Arrived(tokens_per_expert, FusedMetadata(map, experts_TK)))

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, FusedMetadata]:
        arrived: Arrived = flight.state
        if self.spare_rows or not flight.x.is_cuda:
            return flight.x, arrived.tokens_per_expert, flight.probs, arrived.metadata
        tokens_per_expert = arrived.tokens_per_expert.cpu()
        num_rows = int(tokens_per_expert.sum())
        return flight.x[:num_rows], tokens_per_expert, flight.probs[:num_rows], arrived.metadata

    def reduce(self, rows_RD: Tensor, metadata: FusedMetadata) -> Tensor:
        return rows_RD

    def exchange_back(self, x: Tensor, metadata: FusedMetadata) -> Tensor:
        return library.combine(self.transport, x.contiguous(), metadata.map, metadata.experts_TK, self.num_local_experts)

    def restore(self, x: Tensor, metadata: FusedMetadata) -> Tensor:
        return x

    def rows_sent(self, metadata: FusedMetadata) -> RowsSent:
        goes_TK, rank_TK = metadata.experts_TK >= 0, metadata.experts_TK // self.num_local_experts
        # a row for each rank, though several of the token's experts may be there
        goes_TK[:, 1:] &= rank_TK[:, 1:] != rank_TK[:, :-1]
        stayed = (goes_TK & (rank_TK == registered(self.transport).group.rank())).sum()
        return RowsSent(stayed, goes_TK.sum() - stayed)


def repeat_per_shard(x_TE: Tensor, num_local_experts: int, expert_tp_size: int) -> Tensor:
    """One column for each expert and rank that holds it: [T, E] -> [T, Q], rank g's columns from g * num_local_experts.

    Each block of `num_local_experts` experts lives on `expert_tp_size` consecutive ranks.
    """
    if expert_tp_size == 1:
        return x_TE
    return x_TE.unflatten(1, (-1, num_local_experts)).repeat_interleave(expert_tp_size, 1).flatten(1)
