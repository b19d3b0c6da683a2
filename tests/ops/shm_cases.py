"""Random exchanges, and what the ops must give for them, worked out by every rank from the case alone, in whole-tensor torch."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of each rank, and what they want. All ranks draw the same from the seed."""

    seed: int
    tokens_G: tuple[int, ...]
    hidden: int
    columns: int
    num_local: int
    skew: float
    drop_share: float
    alignment: int
    dtype: torch.dtype
    probs_dtype: torch.dtype


def random_case(seed: int, ranks: int) -> Case:
    """Mostly small; one in a hundred is larger than the smallest half."""
    draw = random.Random(seed)
    num_local = draw.choice((1, 1, 2, 3, 4, 8))
    most, hidden = (700, draw.choice((1024, 1031))) if draw.random() < 0.01 else (draw.choice((1, 7, 40)), draw.randint(1, 70))
    return Case(
        seed=seed,
        tokens_G=tuple(draw.choice((0, most, draw.randint(0, most))) for _ in range(ranks)),
        hidden=hidden,
        columns=min(draw.choice((1, 2, 2, 3, 8)), num_local * ranks),
        num_local=num_local,
        skew=draw.choice((0.0, 1.0, 4.0)),
        drop_share=draw.choice((0.0, 0.0, 0.3, 1.0)),
        alignment=draw.choice((1, 1, 1, 2, 16)),
        dtype=draw.choice(DTYPES),
        probs_dtype=draw.choice(DTYPES),
    )


class Expected:
    """Inputs of all ranks, and what each op must return. A is the number of all tokens, M that of all (token, expert) pairs."""

    def __init__(self, case: Case):
        self.case, ranks = case, len(case.tokens_G)
        g = self.generator = torch.Generator().manual_seed(case.seed)
        self.starts = [sum(case.tokens_G[:rank]) for rank in range(ranks + 1)]
        total, slots = self.starts[-1], case.num_local * ranks
        self.x_AD = self.random(total, case.hidden)
        self.probs_AK = torch.rand(total, case.columns, generator=g).to(case.probs_dtype)
        wish_AQ = torch.rand(total, slots, generator=g) * torch.arange(1, slots + 1) ** -case.skew
        chosen_AK = wish_AQ.topk(case.columns, 1).indices
        dropped_AK = torch.rand(total, case.columns, generator=g) < case.drop_share
        sorted_AK = chosen_AK.masked_fill(dropped_AK, slots).sort(1).values
        self.experts_AK = torch.where(sorted_AK == slots, -1, sorted_AK).int()
        self._number_rows(slots)

    def _number_rows(self, slots: int) -> None:
        case = self.case
        flat = self.experts_AK.reshape(-1).long()
        entries_M = torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]  # by expert, then source and token
        expert_M = flat[entries_M]
        counts_Q = torch.bincount(expert_M, minlength=slots)
        padded_Q = -(-counts_Q // case.alignment) * case.alignment
        self.padded_GL = padded_Q.view(-1, case.num_local)
        starts_Q = padded_Q.cumsum(0) - padded_Q
        row_M = starts_Q[expert_M] + torch.arange(len(entries_M)) - (counts_Q.cumsum(0) - counts_Q)[expert_M]
        # Rows of all ranks, one rank after the other.
        self.row_AK = torch.full((flat.numel(),), -1).index_put((entries_M,), row_M).view(self.experts_AK.shape)
        self.entry_R = torch.full((int(padded_Q.sum()),), -1).index_put((row_M,), entries_M)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.case.dtype)

    def tokens(self, of_tokens: Tensor, rank: int) -> Tensor:
        """The rank's part of a tensor [A, ...]."""
        return of_tokens[self.starts[rank] : self.starts[rank + 1]]

    def rows(self, of_rows: Tensor, rank: int) -> Tensor:
        """The rank's part of a tensor of all ranks' rows."""
        before = int(self.padded_GL[:rank].sum())
        return of_rows[before : before + int(self.padded_GL[rank].sum())]

    def expand(self, x_AD: Tensor) -> Tensor:
        """All ranks' rows; zeros in the padding."""
        padding = self.entry_R < 0
        return x_AD[self.entry_R.div(self.case.columns, rounding_mode="floor").masked_fill(padding, 0)].masked_fill(padding[:, None], 0)

    def row_probs(self) -> Tensor:
        padding = self.entry_R < 0
        return self.probs_AK.reshape(-1)[self.entry_R.masked_fill(padding, 0)].masked_fill(padding, 0)

    def reduce(self, rows: Tensor, rank: int) -> Tensor:
        """Each of the rank's tokens' rows, summed as the collectives do it: on each rank, rounded, over ranks, rounded."""
        case, exact = self.case, torch.float64 if self.case.dtype == torch.float64 else torch.float32
        experts_TK, row_TK = self.tokens(self.experts_AK, rank), self.tokens(self.row_AK, rank)
        total_TD = torch.zeros(len(experts_TK), case.hidden, dtype=exact)
        partial_TD, home_T = torch.zeros_like(total_TD), torch.full((len(experts_TK),), -1)
        begun_T = torch.zeros(len(experts_TK), dtype=torch.bool)
        last = torch.full((len(experts_TK), 1), -2)
        homes_TK = torch.cat([torch.where(experts_TK < 0, -2, experts_TK // case.num_local), last], 1)
        values = rows.to(exact) if len(rows) else torch.zeros(1, case.hidden, dtype=exact)
        for k in range(case.columns + 1):
            other_T = homes_TK[:, k] != home_T
            done_T, rounded_TD = other_T & (home_T >= 0), partial_TD.to(case.dtype).to(exact)
            total_TD = torch.where(done_T[:, None], torch.where(begun_T[:, None], total_TD + rounded_TD, rounded_TD), total_TD)
            begun_T, home_T = begun_T | done_T, homes_TK[:, k]
            if k < case.columns:
                value_TD = values[row_TK[:, k].clamp(min=0)]
                partial_TD = torch.where(other_T[:, None], value_TD, partial_TD + value_TD)
        return total_TD.to(case.dtype)

    def return_values(self, values: Tensor, rank: int) -> Tensor:
        row_TK = self.tokens(self.row_AK, rank)
        if not len(values):
            return torch.zeros(row_TK.shape, dtype=values.dtype)
        return values[row_TK.clamp(min=0)].masked_fill(row_TK < 0, 0)


def check_case(transport, case: Case) -> None:
    """All five ops of one case, bit for bit (but for the sign of zeros)."""
    expected, rank = Expected(case), transport.arena.rank
    own = lambda of_tokens: expected.tokens(of_tokens, rank)  # noqa: E731
    experts = own(expected.experts_AK)
    counts = torch.arange(case.columns) + rank
    same(transport.gather_counts(counts), torch.stack([torch.arange(case.columns) + g for g in range(len(case.tokens_G))]), case)

    rows, row_probs, counts, map = transport.dispatch(own(expected.x_AD), experts, own(expected.probs_AK), case.num_local, case.alignment)
    same(rows, expected.rows(expected.expand(expected.x_AD), rank), case)
    same(row_probs, expected.rows(expected.row_probs(), rank), case)
    same(counts, expected.padded_GL[rank], case)

    outputs, grad_y, grads = (expected.random(n, case.hidden) for n in (len(expected.entry_R), len(expected.x_AD), len(expected.entry_R)))
    same(transport.combine(expected.rows(outputs, rank), map, experts, case.num_local), expected.reduce(outputs, rank), case)
    grad_rows = transport.combine_backward(own(grad_y), map, experts, case.num_local, len(rows))
    same(grad_rows, expected.rows(expected.expand(grad_y), rank), case)
    grad_row_probs = torch.rand(len(expected.entry_R), generator=expected.generator).to(case.probs_dtype)
    grad_x, grad_probs = transport.dispatch_backward(
        expected.rows(grads, rank), expected.rows(grad_row_probs, rank), map, experts, case.num_local
    )
    same(grad_x, expected.reduce(grads, rank), case)
    same(grad_probs, expected.return_values(grad_row_probs, rank), case)


def same(found: Tensor, wanted: Tensor, case: Case) -> None:
    assert found.dtype == wanted.dtype, (found.dtype, wanted.dtype, case)
    assert torch.equal(found, wanted), f"differs in {case}"
