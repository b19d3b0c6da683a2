"""Plain-torch twins of collectives, transports and MoE layers: slow and obvious."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def ragged_all_to_all(x: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Twin of `ops.ragged.ragged_all_to_all`, by gathering everything everywhere as Python objects. No gradient."""
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, (x.detach().cpu(), list(input_splits)), group=group)
    me = group.rank()
    blocks = [rows[sum(splits[:me]) : sum(splits[: me + 1])] for rows, splits in gathered]
    assert [block.shape[0] for block in blocks] == list(output_splits), "splits disagree between ranks"
    return torch.cat(blocks).to(x.device)


class ReferenceTransport:
    """Twin of every `ops.transports.registry.Transport`: all ranks see everything, as Python objects.

    `map` holds (source rank, token, k) of each row, -1 for padding, one after the other.
    """

    name = "reference"

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def _everyone(self, *mine) -> list[tuple]:
        gathered: list = [None] * self.group.size()
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def gather_counts(self, counts_Q: Tensor) -> Tensor:
        return torch.stack([counts for (counts,) in self._everyone(counts_Q)])

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        everyone = self._everyone(x_TD, experts_TK, probs_TK)
        first = self.group.rank() * num_local
        map, counts = [], []
        for expert in range(first, first + num_local):
            of_expert = [(s, t, k) for s, (_, experts, _) in enumerate(everyone) for t, k in (experts == expert).nonzero().tolist()]
            of_expert += [(-1, -1, -1)] * (-len(of_expert) % alignment)
            counts.append(len(of_expert))
            map += of_expert
        rows, row_probs = x_TD.new_zeros(len(map), x_TD.shape[1]), probs_TK.new_zeros(len(map))
        for r, (s, t, k) in enumerate(map):
            if s >= 0:
                rows[r], row_probs[r] = everyone[s][0][t], everyone[s][2][t, k]
        return rows, row_probs, torch.tensor(counts), torch.tensor(map, dtype=torch.int32).reshape(-1)

    def combine(self, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int) -> Tensor:
        num_tokens, dtype = experts_TK.shape[0], rows_RD.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        y_TD = torch.zeros(num_tokens, rows_RD.shape[1], dtype=exact)
        for rows, from_rank in self._everyone(rows_RD, map):
            partial_TD = torch.zeros_like(y_TD)
            for r, (s, t, _) in enumerate(_triples(from_rank)):
                if s == self.group.rank():
                    partial_TD[t] += rows[r]
            y_TD += partial_TD.to(dtype)
        return y_TD.to(dtype)

    def combine_backward(self, grad_y_TD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, num_rows: int) -> Tensor:
        everyone = self._everyone(grad_y_TD)
        grad_rows_RD = grad_y_TD.new_zeros(num_rows, grad_y_TD.shape[1])
        for r, (s, t, _) in enumerate(_triples(map)):
            if s >= 0:
                grad_rows_RD[r] = everyone[s][0][t]
        return grad_rows_RD

    def dispatch_backward(
        self, grad_rows_RD: Tensor, grad_row_probs_R: Tensor, map: Tensor, experts_TK: Tensor, num_local: int
    ) -> tuple[Tensor, Tensor]:
        grad_probs_TK = grad_row_probs_R.new_zeros(experts_TK.shape)
        for grad_row_probs, from_rank in self._everyone(grad_row_probs_R, map):
            for r, (s, t, k) in enumerate(_triples(from_rank)):
                if s == self.group.rank():
                    grad_probs_TK[t, k] = grad_row_probs[r]
        return self.combine(grad_rows_RD, map, experts_TK, num_local), grad_probs_TK

    def close(self) -> None:
        """Nothing is held."""


def _triples(map: Tensor) -> list[list[int]]:
    return map.reshape(-1, 3).tolist()


def moe_layer(x_TD: Tensor, probs_TE: Tensor, routing_map_TE: Tensor, expert_fn) -> Tensor:
    """What every dispatcher computes, with all experts at hand: sum over a token's experts of prob x expert(token).

    expert_fn(e, x [n, D], probs [n]) -> [n, D] applies logical expert e and its probabilities.
    """
    y_TD = torch.zeros_like(x_TD)
    for e in range(probs_TE.shape[1]):
        tokens = routing_map_TE[:, e].nonzero()[:, 0]
        y_TD = y_TD.index_add(0, tokens, expert_fn(e, x_TD[tokens], probs_TE[tokens, e]))
    return y_TD
