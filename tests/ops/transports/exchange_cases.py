"""Exchanges through a transport, and what each rank must get, by plain indexing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_scalemoe.ops.transports.cuda import Limits
from megatron_scalemoe.ops.transports.registry import Transport


@dataclasses.dataclass(frozen=True)
class Case:
    """One exchange; ranks have `tokens` tokens each, in turn. A token wants each slot with a chance that makes about `wanted` x K of them;
    with a skew the K that it gets of these are rather the first ones."""

    ranks: int = 2
    top_k: int = 2
    num_local: int = 2
    tokens: tuple[int, ...] = (24, 17)
    columns: int = 32
    dtype: torch.dtype = torch.float32
    probs_dtype: torch.dtype = torch.float32
    alignment: int = 1
    wanted: float = 1.0
    skew: float = 0.0
    max_rows: int | None = None

    @property
    def limits(self) -> Limits:
        return Limits(max(*self.tokens, 1), self.top_k, self.columns * self.dtype.itemsize, self.max_rows)

    @property
    def capacity(self) -> int:
        return self.limits.row_capacity(self.ranks, self.top_k, self.num_local, self.alignment)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of one rank: rows and gradients to send, and those that its experts give back."""

    x: Tensor
    experts: Tensor
    probs: Tensor
    grad_y: Tensor
    expert_out: Tensor
    grad_rows: Tensor
    grad_row_probs: Tensor
    counts: Tensor


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Of one rank."""

    rows: Tensor
    row_probs: Tensor
    tokens_per_expert: Tensor
    y: Tensor
    grad_rows: Tensor
    grad_x: Tensor
    grad_probs: Tensor
    gathered: Tensor


def make_inputs(case: Case, rank: int, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(1000 * seed + rank)
    tokens, columns = case.tokens[rank % len(case.tokens)], case.ranks * case.num_local
    wants = torch.rand(tokens, columns, generator=g) < case.wanted * min(1.0, (case.top_k + 0.5) / columns)
    chosen = (torch.rand(tokens, columns, generator=g) + 1) * torch.arange(1, columns + 1) ** -case.skew * wants
    kept = (chosen > 0) & (chosen >= chosen.sort(1, descending=True).values[:, : case.top_k][:, -1:])
    experts = torch.where(kept, torch.arange(columns), columns).sort(1).values
    experts = torch.nn.functional.pad(experts, (0, case.top_k), value=columns)[:, : case.top_k]
    experts = experts.masked_fill(experts == columns, -1).int().contiguous()
    probs = torch.rand(tokens, case.top_k, generator=g).to(case.probs_dtype) * (experts >= 0)

    def random(rows: int) -> Tensor:
        return torch.randn(rows, case.columns, generator=g).to(case.dtype)

    return Inputs(
        random(tokens),
        experts,
        probs,
        random(tokens),
        random(case.capacity),
        random(case.capacity),
        torch.rand(case.capacity, generator=g).to(case.probs_dtype),
        torch.randint(1000, (columns,), generator=g),
    )


def run_operations(transport: Transport, inputs: Inputs, case: Case) -> Outputs:
    """All operations of one step on one rank, one after the other. The experts give back as many rows as they got."""
    gathered = transport.gather_counts(inputs.counts)
    rows, row_probs, tokens_per_expert, map = transport.dispatch(inputs.x, inputs.experts, inputs.probs, case.num_local, case.alignment)
    y = transport.combine(inputs.expert_out[: len(rows)], map, inputs.experts, case.num_local)
    grad_rows = transport.combine_backward(inputs.grad_y, map, inputs.experts, case.num_local, len(rows))
    grad_row_probs = inputs.grad_row_probs[: len(rows)]
    grads = transport.dispatch_backward(inputs.grad_rows[: len(rows)], grad_row_probs, map, inputs.experts, case.num_local)
    return Outputs(rows, row_probs, tokens_per_expert, y, grad_rows, *grads, gathered)


def expected_outputs(ranks: Sequence[Inputs], case: Case) -> list[Outputs]:
    """What each rank must get, by plain indexing. Rows end where the last expert's do."""
    placed = [place_rows(ranks, case, g) for g in range(len(ranks))]
    received = [receive(ranks, case, *placed[g]) for g in range(len(ranks))]
    gathered = torch.stack([inputs.counts for inputs in ranks])
    outputs = []
    for s, inputs in enumerate(ranks):
        row_of_GTK = torch.stack([row_of[s] for row_of, _ in placed])
        y = sum_back([r.expert_out for r in ranks], row_of_GTK)
        grad_x = sum_back([r.grad_rows for r in ranks], row_of_GTK)
        grad_probs = torch.zeros_like(inputs.probs)
        for r, row_of_TK in zip(ranks, row_of_GTK, strict=True):
            grad_probs = torch.where(row_of_TK >= 0, r.grad_row_probs[row_of_TK.clamp(min=0)], grad_probs)
        rows, row_probs, grad_rows = received[s]
        outputs.append(Outputs(rows, row_probs, placed[s][1], y, grad_rows, grad_x, grad_probs, gathered))
    return outputs


def place_rows(ranks: Sequence[Inputs], case: Case, g: int) -> tuple[list[Tensor], Tensor]:
    """The row at rank g of each (source, token, k), -1 for none; and tokens_per_expert, padding included."""
    row_of, counts, row = [torch.full_like(inputs.experts, -1).long() for inputs in ranks], [], 0
    for expert in range(g * case.num_local, (g + 1) * case.num_local):
        first = row
        for s, inputs in enumerate(ranks):
            wants_TK = inputs.experts == expert
            row_of[s][wants_TK] = row + torch.arange(int(wants_TK.sum()))
            row += int(wants_TK.sum())
        row += (first - row) % case.alignment
        counts.append(row - first)
    return row_of, torch.tensor(counts)


def receive(ranks: Sequence[Inputs], case: Case, row_of: list[Tensor], counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows, row_probs and the gradients of the experts' outputs at one rank."""
    num_rows = int(counts.sum())
    rows, grad_rows = (torch.zeros(num_rows, case.columns, dtype=case.dtype) for _ in range(2))
    row_probs = torch.zeros(num_rows, dtype=case.probs_dtype)
    for inputs, row_of_TK in zip(ranks, row_of, strict=True):
        t, k = (row_of_TK >= 0).nonzero(as_tuple=True)
        rows[row_of_TK[t, k]], grad_rows[row_of_TK[t, k]] = inputs.x[t], inputs.grad_y[t]
        row_probs[row_of_TK[t, k]] = inputs.probs[t, k]
    return rows, row_probs, grad_rows


def sum_back(rows_G: Sequence[Tensor], row_of_GTK: Tensor) -> Tensor:
    """Each rank's rows of a token summed in fp32 (fp64) in ascending order of experts and rounded, then the ranks' sums likewise."""
    num_tokens, columns, dtype = row_of_GTK.shape[1], rows_G[0].shape[1], rows_G[0].dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    y = torch.zeros(num_tokens, columns, dtype=exact)
    for rows, row_of_TK in zip(rows_G, row_of_GTK, strict=True):
        partial = torch.zeros_like(y)
        for row_of_T in row_of_TK.unbind(1):
            (t,) = (row_of_T >= 0).nonzero(as_tuple=True)
            partial[t] += rows[row_of_T[t]].to(exact)
        y += partial.to(dtype).to(exact)
    return y.to(dtype)


def differing(outputs: Outputs, expected: Outputs) -> list[str]:
    """Names of the outputs that are not equal bit by bit (but for the sign of zero)."""
    num_rows = len(expected.rows)
    cut = dataclasses.replace(
        outputs, rows=outputs.rows[:num_rows], row_probs=outputs.row_probs[:num_rows], grad_rows=outputs.grad_rows[:num_rows]
    )
    names = [field.name for field in dataclasses.fields(Outputs)]
    pairs = {name: (getattr(cut, name), getattr(expected, name)) for name in names}
    return [name for name, (found, wanted) in pairs.items() if found.dtype != wanted.dtype or not torch.equal(found, wanted)]
