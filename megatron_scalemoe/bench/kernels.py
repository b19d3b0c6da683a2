"""What `scalemoe bench kernels` measures: rows into expert order and back, by our ops, by plain torch and by Megatron-Core, in turns.

One function of `MEASURED` per op: it gives, for each contender, a function to prepare an untimed start and one to time. A new kernel is a
new function there.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_scalemoe.bench.routed_tokens import DTYPES, make_routed_tokens
from megatron_scalemoe.bench.worker import synchronize
from megatron_scalemoe.mcore.stock import stock_permute, stock_unpermute
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.permute import RowMap, permute, row_map, unpermute

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens x [T, D] and probs [T, E], leaves, with the bool map [T, E] of their experts: `num_rows` in all."""

    x: Tensor
    probs: Tensor
    routing_map: Tensor
    num_rows: int

    @property
    def bytes_moved(self) -> int:
        """Of each op: one side has a row per token, the other one per token and expert."""
        return (self.x.shape[0] + self.num_rows) * self.x.shape[1] * self.x.element_size()


@dataclasses.dataclass(frozen=True)
class Contender:
    """`permute(x, probs, routing_map, num_rows)` -> rows, row_probs, map; `unpermute(rows, map, num_tokens)` -> x again, summed."""

    permute: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Any]]
    unpermute: Callable[[Tensor, Any, int], Tensor]


# What makes a fresh input of the timed function, and the timed function.
Timed = tuple[Callable[[], Any], Callable[[Any], Any]]


def measure(
    sizes_mib: list[float],
    dtypes: list[str],
    skews: list[float],
    *,
    hidden: int,
    experts: int,
    topk: int,
    iters: int,
    warmup: int,
    seed: int,
) -> Iterator[dict]:
    """One row for each op and contender, for each case; results are compared with Megatron's. `sizes_mib`: bytes of the permuted rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in dtypes:
        for size in sizes_mib:
            for skew in skews:
                case = make_case(size, hidden, experts, topk, skew, DTYPES[dtype], seed, device)
                for row in measure_case(case, iters, warmup):
                    yield {"dtype": dtype, "bytes_permuted": case.num_rows * hidden * case.x.element_size(), "skew": skew, **row}


def make_case(
    size_mib: float, hidden: int, experts: int, topk: int, skew: float, dtype: torch.dtype, seed: int, device: torch.device
) -> Case:
    """Tokens whose top-k rows take `size_mib`, with distinct experts from a Zipf law of exponent `skew`."""
    tokens = max(int(size_mib * MIB) // (topk * hidden * dtype.itemsize), 1)
    routed = make_routed_tokens(tokens, hidden, experts, topk, skew, dtype, seed, device)
    return Case(routed.x.requires_grad_(), routed.probs.requires_grad_(), routed.routing_map, tokens * topk)


def measure_case(case: Case, iters: int, warmup: int) -> list[dict]:
    """The rows of one case: time, GB/s, and the time of a copy of as many bytes over it. Contenders and copies take turns."""
    rows = []
    for op, of_contender in MEASURED.items():
        timed = {**of_contender(case), **_copies(case)}
        times_ms = _times_in_turns(timed, iters, warmup)
        median_ms = {name: statistics.median(times) for name, times in times_ms.items()}
        results = {name: function(start()) for name, (start, function) in timed.items() if name in CONTENDERS}
        rows += [
            {
                "op": op,
                "by": name,
                "median_ms": median_ms[name],
                "p90_ms": statistics.quantiles(times_ms[name], n=10, method="inclusive")[-1],
                "gb_per_s": case.bytes_moved / median_ms[name] / 1e6,
                "of_warm_copy": median_ms["copy, warm"] / median_ms[name],
                "of_fresh_copy": median_ms["copy, fresh"] / median_ms[name],
                "max_rel_error": _largest_error(results[name], results["megatron"]),
            }
            for name in CONTENDERS
        ]
    return rows


def environment() -> dict[str, object]:
    """What decides these figures, beside the machine."""
    on_cuda = torch.cuda.is_available()
    missing = {kind: native.why_not(kind) for kind in ("cpu", "cuda")}
    return {
        "device": torch.cuda.get_device_name() if on_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "native": {kind: reason or "loaded" for kind, reason in missing.items()},
        "scalemoe_is_native": not on_cuda and missing["cpu"] is None,
    }


# ---- contenders ----


def _permute_ours(x: Tensor, probs: Tensor, routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor, RowMap]:
    """As `LocalDispatcher.expand`."""
    expert_R, token_R = routing_map.T.nonzero_static(size=num_rows).unbind(1)
    rows = row_map(token_R, x.shape[0])
    return permute(x, rows), _probs_of(probs, token_R, expert_R), rows


def _permute_torch(x: Tensor, probs: Tensor, routing_map: Tensor, num_rows: int) -> tuple[Tensor, Tensor, RowMap]:
    """The same with torch's own ops, each direction by the fastest that we know."""
    expert_R, token_R = routing_map.T.nonzero_static(size=num_rows).unbind(1)
    order_R = torch.argsort(token_R, stable=True)
    rows = RowMap(token_R, order_R, torch.searchsorted(token_R[order_R], torch.arange(x.shape[0] + 1, device=x.device)))
    return _ByTorch.apply(x, rows, _gather, _segment_sums), _probs_of(probs, token_R, expert_R), rows


def _probs_of(probs_TE: Tensor, token_R: Tensor, expert_R: Tensor) -> Tensor:
    return probs_TE.reshape(-1).index_select(0, token_R * probs_TE.shape[1] + expert_R)


def _gather(x: Tensor, rows: RowMap) -> Tensor:
    return x.index_select(0, rows.index_M)


def _segment_sums(x: Tensor, rows: RowMap) -> Tensor:
    return torch.nn.functional.embedding_bag(rows.order_M, x, rows.offsets, mode="sum", include_last_offset=True)


class _ByTorch(torch.autograd.Function):
    """A linear function of rows, and its transpose as gradient."""

    @staticmethod
    def forward(ctx, x, rows, function, transpose):
        ctx.rows, ctx.transpose = rows, transpose
        return function(x, rows)

    @staticmethod
    def backward(ctx, grad):
        return ctx.transpose(grad, ctx.rows), None, None, None


CONTENDERS = {
    "scalemoe": Contender(_permute_ours, lambda rows, map, num_tokens: unpermute(rows, map)),
    "torch": Contender(_permute_torch, lambda rows, map, num_tokens: _ByTorch.apply(rows, map, _segment_sums, _gather)),
    "megatron": Contender(stock_permute, stock_unpermute),
}


# ---- measured ops ----


def permute_forward(case: Case) -> dict[str, Timed]:
    """Map, rows and probabilities from the routing; nothing is prepared."""

    def timed(contender: Contender) -> Timed:
        return lambda: None, lambda _: contender.permute(case.x, case.probs, case.routing_map, case.num_rows)[:2]

    return {name: timed(contender) for name, contender in CONTENDERS.items()}


def permute_backward(case: Case) -> dict[str, Timed]:
    """Gradients of tokens and probabilities."""

    def timed(contender: Contender) -> Timed:
        def start():
            outputs = contender.permute(case.x, case.probs, case.routing_map, case.num_rows)[:2]
            return outputs, [output.detach() for output in outputs]

        return start, lambda started: torch.autograd.grad(started[0], [case.x, case.probs], started[1])

    return {name: timed(contender) for name, contender in CONTENDERS.items()}


def unpermute_forward(case: Case) -> dict[str, Timed]:
    """Rows, which the experts multiplied by their probabilities, summed by token."""
    return {name: _unpermute_from(case, contender) for name, contender in CONTENDERS.items()}


def unpermute_backward(case: Case) -> dict[str, Timed]:
    """Each row its token's gradient."""

    def timed(contender: Contender) -> Timed:
        (rows_of, function), grad = _unpermute_from(case, contender), case.x.detach()

        def start():
            rows = rows_of()
            return function(rows), rows

        return start, lambda started: torch.autograd.grad(started[0], started[1], grad)

    return {name: timed(contender) for name, contender in CONTENDERS.items()}


def _unpermute_from(case: Case, contender: Contender) -> Timed:
    rows, row_probs, map = contender.permute(case.x.detach(), case.probs.detach(), case.routing_map, case.num_rows)
    rows = (rows * row_probs[:, None]).to(rows.dtype).requires_grad_()
    return lambda: rows, lambda rows: contender.unpermute(rows, map, case.x.shape[0])


MEASURED: dict[str, Callable[[Case], dict[str, Timed]]] = {
    "permute": permute_forward,
    "permute backward": permute_backward,
    "unpermute": unpermute_forward,
    "unpermute backward": unpermute_backward,
}


# ---- timing ----


def _copies(case: Case) -> dict[str, Timed]:
    """Copies that move as many bytes: into memory that is there, and into new memory."""
    source = torch.ones(case.bytes_moved // 2, dtype=torch.uint8, device=case.x.device)
    target = source.clone()
    return {
        "copy, warm": (lambda: None, lambda _: target.copy_(source)),
        "copy, fresh": (lambda: None, lambda _: torch.empty_like(source).copy_(source)),
    }


def _times_in_turns(timed: dict[str, Timed], iters: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of each, one after the other in every iteration, so that a drift of the machine's speed hits all alike.

    Each time in another order: who comes after whom decides what it finds in the caches.
    """
    order = random.Random(0)
    times_ms: dict[str, list[float]] = {name: [] for name in timed}
    for iteration in range(warmup + iters):
        for name, (start, function) in order.sample(list(timed.items()), len(timed)):
            started = start()
            synchronize()
            began = time.perf_counter()
            result = function(started)
            synchronize()
            if iteration >= warmup:
                times_ms[name].append(1e3 * (time.perf_counter() - began))
            del started, result
    return times_ms


def _largest_error(results: Any, expected: Any) -> float:
    """Largest difference of any tensor, relative to its largest expected value."""
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    with torch.no_grad():
        return float(max((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30) for a, b in pairs))
