"""Runs several token dispatchers on the same routing and measures each: time, bytes on the wire, difference to the first."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.bench.routed_tokens import RoutedTokens
from megatron_scalemoe.bench.worker import synchronize
from megatron_scalemoe.mcore.stock import MoETokenDispatcher
from megatron_scalemoe.ops.wire import WireMeter


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One dispatcher: times of the slowest rank per iteration, bytes that left all ranks by collectives, largest relative difference to the
    baseline."""

    median_ms: float
    p90_ms: float
    bytes_out: int
    bytes_out_dispatch: int
    max_rel_error: float


def measure_dispatchers(
    dispatchers: Mapping[str, MoETokenDispatcher], inputs: Sequence[RoutedTokens], *, iters: int, warmup: int
) -> dict[str, Measurement]:
    """Dispatch and combine, forward and backward, summed over `inputs`, with experts that return their input.

    The dispatchers take turns in every iteration, so that a drift of the machine's speed hits all alike; the first one is the baseline for
    `max_rel_error`, which compares outputs and gradients of x and probs with experts that multiply by their probabilities.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in dispatchers}
    for iteration in range(warmup + iters):
        for name, dispatcher in dispatchers.items():
            elapsed_ms = sum(_timed_ms(dispatcher, routed) for routed in inputs)
            if iteration >= warmup:
                times_ms[name].append(elapsed_ms)
    bytes_out = {name: [_bytes_out(dispatcher, routed) for routed in inputs] for name, dispatcher in dispatchers.items()}
    baseline = next(iter(dispatchers))
    errors = dict.fromkeys(dispatchers, 0.0)
    for routed in inputs:
        expected = _results(dispatchers[baseline], routed)
        for name, dispatcher in dispatchers.items():
            errors[name] = max(errors[name], _largest_error(_results(dispatcher, routed), expected))
    return {
        name: Measurement(
            median_ms=_quantile(times_ms[name], 0.5),
            p90_ms=_quantile(times_ms[name], 0.9),
            bytes_out=sum(total for total, _ in bytes_out[name]),
            bytes_out_dispatch=sum(dispatch for _, dispatch in bytes_out[name]),
            max_rel_error=errors[name],
        )
        for name in dispatchers
    }


def same_bits(dispatchers: Iterable[MoETokenDispatcher], inputs: Sequence[RoutedTokens]) -> bool:
    """Do all of them give the same outputs and gradients on all ranks, bit for bit?"""
    results = [[tensor for routed in inputs for tensor in _results(dispatcher, routed)] for dispatcher in dispatchers]
    return _sum_over_ranks(sum(not torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))) == 0


def deduplicated_bytes(routed: RoutedTokens, group: dist.ProcessGroup) -> int:
    """Bytes of x that any dispatch must move: one row per token and other rank that holds one of its experts. All ranks, forward."""
    wanted_TG = routed.routing_map.unflatten(1, (group.size(), -1)).any(2)
    pairs = wanted_TG.sum() - wanted_TG[:, group.rank()].sum()
    return _sum_over_ranks(int(pairs) * routed.x.shape[1] * routed.x.element_size())


def _forward(dispatcher: MoETokenDispatcher, x: Tensor, probs: Tensor, routing_map: Tensor, expert) -> tuple[Tensor, Tensor]:
    """The six steps around `expert(rows, row_probs)`; returns the combined output and the rows' probabilities."""
    hidden, p = dispatcher.dispatch_preprocess(x[:, None], routing_map, probs)
    rows, _, row_probs = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(hidden, p))
    reduced = dispatcher.combine_preprocess(expert(rows, row_probs))
    return dispatcher.combine_postprocess(dispatcher.token_combine(reduced)), row_probs


def _leaves(routed: RoutedTokens) -> tuple[Tensor, Tensor]:
    return routed.x.detach().requires_grad_(), routed.probs.detach().requires_grad_()


def _timed_ms(dispatcher: MoETokenDispatcher, routed: RoutedTokens) -> float:
    """Forward and backward of one dispatch and combine, on the slowest rank."""
    x, probs = _leaves(routed)
    dist.barrier()
    synchronize()
    start = time.perf_counter()
    y, row_probs = _forward(dispatcher, x, probs, routed.routing_map, _identity)
    synchronize()
    forward_s = time.perf_counter() - start
    gradients = [torch.ones_like(y), torch.ones_like(row_probs)]  # not the dispatcher's work
    synchronize()
    start = time.perf_counter()
    torch.autograd.backward([y, row_probs], gradients)
    synchronize()
    elapsed = torch.tensor((forward_s + time.perf_counter() - start) * 1e3, dtype=torch.float64, device=x.device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def _bytes_out(dispatcher: MoETokenDispatcher, routed: RoutedTokens) -> tuple[int, int]:
    """Bytes that leave all ranks in forward and backward, and in the forward dispatch alone."""
    x, probs = _leaves(routed)
    at_experts = []

    def expert(rows: Tensor, row_probs: Tensor) -> Tensor:
        at_experts.append(meter.bytes_out)
        return rows

    with WireMeter() as meter:
        y, row_probs = _forward(dispatcher, x, probs, routed.routing_map, expert)
        torch.autograd.backward([y, row_probs], [torch.ones_like(y), torch.ones_like(row_probs)])
    return _sum_over_ranks(meter.bytes_out), _sum_over_ranks(at_experts[0])


def _results(dispatcher: MoETokenDispatcher, routed: RoutedTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and probs, with experts that multiply by their probabilities."""
    x, probs = _leaves(routed)
    y, _ = _forward(dispatcher, x, probs, routed.routing_map, _times_probs)
    y.backward(torch.linspace(0.5, 1.5, y.shape[-1], device=y.device).to(y.dtype).expand_as(y).contiguous())
    return y.detach(), x.grad, probs.grad * routed.routing_map


def _largest_error(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Over all ranks: largest difference of any tensor, relative to its largest expected value."""
    errors = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30) for a, b in zip(results, expected, strict=True)
    ]
    largest = torch.stack(errors).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def _identity(rows: Tensor, row_probs: Tensor) -> Tensor:
    return rows


def _times_probs(rows: Tensor, row_probs: Tensor) -> Tensor:
    return (rows * row_probs[:, None]).to(rows.dtype)


def _sum_over_ranks(value: int) -> int:
    total = torch.tensor(value, dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total)
    return int(total)


def _quantile(values: Sequence[float], q: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))
