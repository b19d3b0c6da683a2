"""Adaptive all-to-all: one row per (token, destination rank), no padding, one payload collective per direction.

Adaptive all-to-all is ScaleMoE's (Choi et al., PACT'25): gather the counts, send no zeros. Sending a token once to a rank however many
of its experts live there, and adding up their outputs before the way back, goes beyond the paper. Probabilities and expert ids travel in
the row's own payload, so the receiver needs no second collective to expand the rows.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.dispatch.base import Dispatcher, InFlight, RowsSent
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.permute import RowMap, permute, row_map, unpermute
from megatron_scalemoe.ops.ragged import PendingCounts, Splits, pack_rows, ragged_all_to_all, send_rows, start_count_exchange


@dataclasses.dataclass(frozen=True, slots=True)
class Outgoing:
    """Between `prepare` and `exchange`: rows in (destination rank, token) order."""

    experts_NK: Tensor
    sent: RowMap
    send_rows_G: Tensor
    counts: PendingCounts


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """Between `exchange` and `expand`: rows in (source rank, token) order, with the local experts that want them."""

    experts_NK: Tensor
    tokens_per_expert: list[int]
    sent: RowMap
    splits: Splits


@dataclasses.dataclass(frozen=True, slots=True)
class RaggedMetadata:
    """What `combine` needs: the map from tokens to sent rows, from received rows to expert rows, and the splits."""

    sent: RowMap
    expanded: RowMap
    splits: Splits


class RaggedDispatcher(Dispatcher):
    """Dispatch over `group`, whose ranks hold `num_experts` experts in equal contiguous blocks.

    With `expert_tp_size` > 1 each block lives on that many consecutive ranks of the group, every one with a shard of each expert: a row
    goes to all of them, and their partial outputs are summed at the token's home, so tensor-parallel experts need no collective of their
    own. `max_experts_per_token` bounds how many experts a token may have (top-k; all experts when Megatron pads to capacity). Raises
    `ScaleMoEError` if the experts do not divide, and in `dispatch` and `combine` for tensors of other shapes than theirs.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, max_experts_per_token: int, expert_tp_size: int = 1):
        num_blocks = group.size() // expert_tp_size
        if num_blocks * expert_tp_size != group.size() or num_experts % num_blocks:
            problem = f"num_experts must be a multiple of the group's {group.size()} ranks / expert_tp_size"
            raise ScaleMoEError(problem, found=f"{num_experts} experts, expert_tp_size {expert_tp_size}")
        self.group = group
        self.expert_tp_size = expert_tp_size
        self.num_experts = num_experts
        self.num_local_experts = num_experts // num_blocks
        self.max_experts_per_row = min(max_experts_per_token, self.num_local_experts)
        self.max_rows_per_token = min(max_experts_per_token, num_blocks) * expert_tp_size

    def prepare(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> InFlight:
        num_tokens = x_TD.shape[0]
        self._check_inputs(x_TD, probs_TE, routing_map_TE)
        wanted_GTL = self._wanted_by_rank(routing_map_TE)
        goes_GT = wanted_GTL.any(2)
        send_rows_G = goes_GT.sum(1)
        counts = start_count_exchange(torch.cat([send_rows_G[:, None], wanted_GTL.sum(1)], 1), self.group)
        if not x_TD.is_cuda:
            self._check_experts_per_row(wanted_GTL)
        bound = self._bound_rows(num_tokens, send_rows_G)
        rank_N, token_N = goes_GT.nonzero_static(size=bound, fill_value=0).unbind(1)
        experts_NK = self._local_experts(wanted_GTL, rank_N, token_N)
        probs_NK = self._probs_of(probs_TE, rank_N, token_N, experts_NK)
        sent = row_map(token_N, num_tokens)
        return InFlight(x_TD, probs_NK, Outgoing(experts_NK, sent, send_rows_G, counts))

    def exchange(self, flight: InFlight) -> InFlight:
        out: Outgoing = flight.state
        payload, layout = pack_rows(flight.x, flight.probs, out.experts_NK, out.sent)
        received_GC = out.counts.wait()
        group_size = self.group.size()
        host = torch.cat([out.send_rows_G, received_GC[:, 0], received_GC[:, 1:].sum(0)]).tolist()  # the one device-to-host copy
        splits = Splits(tuple(host[:group_size]), tuple(host[group_size : 2 * group_size]))
        probs, sent = flight.probs, out.sent
        num_sent = sum(splits.input)
        if num_sent < payload.shape[0]:
            payload, probs = payload[:num_sent], probs[:num_sent]
            sent = row_map(sent.index_M[:num_sent], sent.num_rows)
        x_ND, probs_NK, experts_NK = send_rows(flight.x, probs, (payload, layout), sent, splits, self.group)
        return InFlight(x_ND, probs_NK, Received(experts_NK, host[2 * group_size :], sent, splits))

    def expand(self, flight: InFlight) -> tuple[Tensor, Tensor, Tensor, RaggedMetadata]:
        received: Received = flight.state
        num_rows, columns = received.experts_NK.shape
        num_expanded = sum(received.tokens_per_expert)
        # absent experts carry the largest id, so they sort behind the real ones
        order_R = torch.argsort(received.experts_NK.reshape(-1), stable=True)[:num_expanded]
        expanded = row_map(order_R // columns, num_rows)
        row_probs_R = flight.probs.reshape(-1).index_select(0, order_R)
        tokens_per_expert = torch.tensor(received.tokens_per_expert, dtype=torch.int64)
        metadata = RaggedMetadata(received.sent, expanded, received.splits)
        return permute(flight.x, expanded), tokens_per_expert, row_probs_R, metadata

    def reduce(self, rows_RD: Tensor, metadata: RaggedMetadata) -> Tensor:
        if rows_RD.shape[0] != metadata.expanded.index_M.numel():
            problem = f"combine takes the {metadata.expanded.index_M.numel()} rows that dispatch has returned"
            raise ScaleMoEError(problem, found=tuple(rows_RD.shape))
        return unpermute(rows_RD, metadata.expanded)

    def exchange_back(self, x: Tensor, metadata: RaggedMetadata) -> Tensor:
        return ragged_all_to_all(x, metadata.splits.output, metadata.splits.input, self.group)

    def restore(self, x: Tensor, metadata: RaggedMetadata) -> Tensor:
        return unpermute(x, metadata.sent)

    def rows_sent(self, metadata: RaggedMetadata) -> RowsSent:
        stayed = metadata.splits.input[self.group.rank()]
        return RowsSent(stayed, sum(metadata.splits.input) - stayed)

    def _check_inputs(self, x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor) -> None:
        shape = (x_TD.shape[0], self.num_experts)
        if x_TD.dim() == 2 and routing_map_TE.dtype == torch.bool and probs_TE.shape == shape and routing_map_TE.shape == shape:
            return
        of_map = f"{routing_map_TE.dtype} {tuple(routing_map_TE.shape)}"
        raise ScaleMoEError(
            f"dispatch takes x [tokens, hidden], and probs and a bool routing_map [tokens, {self.num_experts}]",
            found=f"x {tuple(x_TD.shape)}, probs {tuple(probs_TE.shape)}, routing_map {of_map}",
        )

    def _wanted_by_rank(self, routing_map_TE: Tensor) -> Tensor:
        """bool [G, T, L]: does token t want expert l of rank g?"""
        wanted_BTL = routing_map_TE.unflatten(1, (-1, self.num_local_experts)).transpose(0, 1)
        return wanted_BTL.repeat_interleave(self.expert_tp_size, 0)

    def _bound_rows(self, num_tokens: int, send_rows_G: Tensor) -> int:
        """Rows to prepare. On CUDA their number is not on the host yet: the most there can be, cut when the counts arrive."""
        return num_tokens * self.max_rows_per_token if send_rows_G.is_cuda else int(send_rows_G.sum())

    def _check_experts_per_row(self, wanted_GTL: Tensor) -> None:
        """Experts beyond `max_experts_per_row` would be lost. Not checked on CUDA, where it would wait for the device."""
        most = int(wanted_GTL.sum(2).max()) if wanted_GTL.numel() else 0
        if most > self.max_experts_per_row:
            raise ScaleMoEError(
                f"this dispatcher was made for at most {self.max_experts_per_row} experts of one rank per token",
                found=f"a token with {most}",
                try_="a larger max_experts_per_token",
            )

    def _local_experts(self, wanted_GTL: Tensor, rank_N: Tensor, token_N: Tensor) -> Tensor:
        """int16 [N, K]: ascending local expert ids of each row, then `num_local_experts` for none."""
        ids_L = torch.arange(self.num_local_experts, dtype=torch.int16, device=wanted_GTL.device)
        ids_NL = torch.where(wanted_GTL[rank_N, token_N], ids_L, self.num_local_experts)
        return ids_NL.sort(1).values[:, : self.max_experts_per_row].contiguous()

    def _probs_of(self, probs_TE: Tensor, rank_N: Tensor, token_N: Tensor, experts_NK: Tensor) -> Tensor:
        """[N, K]: probability of each local expert of each row, 0 for none."""
        absent_NK = experts_NK == self.num_local_experts
        first_expert_N = rank_N // self.expert_tp_size * self.num_local_experts
        expert_NK = first_expert_N[:, None] + experts_NK.masked_fill(absent_NK, 0)
        flat_NK = token_N[:, None] * self.num_experts + expert_NK
        return probs_TE.reshape(-1).index_select(0, flat_NK.reshape(-1)).view_as(flat_NK).masked_fill(absent_NK, 0)
