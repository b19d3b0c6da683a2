"""All experts on this rank: nothing travels, rows are only put in expert order and back."""

from __future__ import annotations

from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.ops.permute import RowMap, permute, row_map, unpermute


class LocalDispatcher(Dispatcher):
    """Dispatch within one rank (expert parallel size 1). The metadata is the `RowMap` from tokens to expert rows."""

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        return InFlight(x_TD, probs_TE, routing_map_TE)

    def exchange(self, flight: InFlight) -> InFlight:
        return flight

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, RowMap]:
        routing_map_ET = flight.state.T
        tokens_per_expert = routing_map_ET.sum(1).cpu()  # the one device-to-host copy
        num_rows = int(tokens_per_expert.sum())
        expert_R, token_R = routing_map_ET.nonzero_static(size=num_rows).unbind(1)
        rows = row_map(token_R, flight.x.shape[0])
        num_experts = routing_map_ET.shape[0]
        row_probs = flight.probs.reshape(-1).index_select(0, token_R * num_experts + expert_R)
        return permute(flight.x, rows), tokens_per_expert, row_probs, rows

    def reduce(self, rows_RD: Tensor, metadata: RowMap) -> Tensor:
        return unpermute(rows_RD, metadata)

    def exchange_back(self, x: Tensor, metadata: RowMap) -> Tensor:
        return x

    def restore(self, x: Tensor, metadata: RowMap) -> Tensor:
        return x

    def rows_sent(self, metadata: RowMap) -> RowsSent:
        return RowsSent(stayed=metadata.index_M.numel())
