"""The CUDA exchange on one GPU: several virtual ranks in one process, every half of every op timed against a copy of as many bytes.

All ranks' pushes are launched before any receive, on one stream, so nothing waits. It measures the kernels' work in one GPU's memory, and
says nothing about NVLink, mapping of peers' memory or the order of writes between GPUs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_scalemoe.ops.transports.cuda import CudaTransport, Limits, SymmetricBuffers

MIB = 1 << 20
TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class VirtualRank:
    """One rank's end of the exchange and what it sends."""

    transport: CudaTransport
    x: Tensor
    experts: Tensor
    probs: Tensor


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """Rows of all ranks together: tokens; rows sent, one per token and rank; rows of the experts, one per token and expert."""

    tokens: int
    sent: int
    expanded: int


def bench_virtual_ranks(
    library: ctypes.CDLL,
    device: torch.device,
    sizes_mib: Sequence[float] = (1, 4, 16, 64, 256, 1024),
    *,
    num_ranks: int = 4,
    hidden: int = 7168,
    experts: int = 32,
    topk: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    iters: int = 20,
    warmup: int = 5,
    seed: int = 0,
) -> Iterator[dict]:
    """One row for each size and half of an op. `sizes_mib`: bytes of all experts' rows together. `of_copy`: time of the copy over time."""
    for size in sizes_mib:
        tokens = max(int(size * MIB) // (num_ranks * topk * hidden * dtype.itemsize), 1)
        ranks = open_virtual_ranks(library, device, num_ranks, tokens, hidden, experts, topk, dtype, seed)
        counts = count_rows(ranks, num_ranks, experts)
        row_bytes = hidden * dtype.itemsize
        for op, (rows_moved, times_ms, copy_ms) in time_halves(ranks, counts, experts // num_ranks, row_bytes, iters, warmup).items():
            median_ms = statistics.median(times_ms)
            yield {
                "op": op,
                "ranks": num_ranks,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes_permuted": counts.expanded * row_bytes,
                "bytes_moved": rows_moved * row_bytes,
                "median_ms": median_ms,
                "p90_ms": statistics.quantiles(times_ms, n=10, method="inclusive")[-1],
                "gb_per_s": rows_moved * row_bytes / median_ms / 1e6,
                "of_copy": statistics.median(copy_ms) / median_ms,
            }
        for rank in ranks:
            rank.transport.check()
            rank.transport.close()


def open_virtual_ranks(
    library: ctypes.CDLL,
    device: torch.device,
    num_ranks: int,
    tokens: int,
    hidden: int,
    experts: int,
    topk: int,
    dtype: torch.dtype,
    seed: int,
) -> list[VirtualRank]:
    """Ranks whose buffers are ordinary memory of `device`, each with `tokens` tokens that want `topk` uniformly drawn experts."""
    limits = Limits(tokens, topk, hidden * dtype.itemsize)
    buffers = [torch.zeros(limits.buffer_bytes(library, num_ranks), dtype=torch.uint8, device=device) for _ in range(num_ranks)]
    pointers = [buffer.data_ptr() for buffer in buffers]
    generator = torch.Generator().manual_seed(seed)
    ranks = []
    for rank in range(num_ranks):
        # `close` of any rank lets go of all buffers: they are closed together
        transport = CudaTransport(library, SymmetricBuffers(rank, pointers, buffers.clear), limits, TIMEOUT_S, device)
        chosen = torch.rand(tokens, experts, generator=generator).topk(topk, dim=1).indices.sort(1).values
        x = torch.randn(tokens, hidden, generator=generator).to(dtype)
        probs = torch.rand(tokens, topk, generator=generator)
        ranks.append(VirtualRank(transport, x.to(device), chosen.int().to(device), probs.to(device)))
    return ranks


def count_rows(ranks: Sequence[VirtualRank], num_ranks: int, experts: int) -> RowCounts:
    """How many rows each half reads and writes."""
    experts_TK = torch.cat([rank.experts for rank in ranks]).long().cpu()
    goes_TG = torch.zeros(len(experts_TK), num_ranks, dtype=torch.bool).scatter_(1, experts_TK // (experts // num_ranks), True)
    return RowCounts(len(experts_TK), int(goes_TG.sum()), experts_TK.numel())


def time_halves(
    ranks: Sequence[VirtualRank], counts: RowCounts, num_local: int, row_bytes: int, iters: int, warmup: int
) -> dict[str, tuple[int, list[float], list[float]]]:
    """Of each half: rows read and written, its times, and the times in ms of a copy that reads and writes as many bytes; all in turns."""
    rows_moved = {
        "dispatch push": counts.tokens + counts.sent,
        "dispatch receive": counts.sent + counts.expanded,
        "combine push": counts.expanded + counts.sent,
        "combine receive": counts.sent + counts.tokens,
    }
    device = ranks[0].x.device
    source = torch.ones(max(rows_moved.values()) * row_bytes // 2, dtype=torch.uint8, device=device)
    target = source.clone()
    results = {name: (moved, [], []) for name, moved in rows_moved.items()}
    timed = halves(ranks, num_local)
    for half in timed:
        half()
    if device.type == "cuda":
        timed = [as_graph(half) for half in timed]
    for iteration in range(warmup + iters):
        for (moved, times_ms, copy_ms), half in zip(results.values(), timed, strict=True):
            nbytes = moved * row_bytes // 2
            took, copy_took = time_ms(half, device), time_ms(lambda n=nbytes: target[:n].copy_(source[:n]), device)
            if iteration >= warmup:
                times_ms.append(took)
                copy_ms.append(copy_took)
    return results


def halves(ranks: Sequence[VirtualRank], num_local: int) -> list[Callable[[], None]]:
    """The four halves of a dispatch and its combine, of all ranks, in the order in which they must be called."""
    dispatched: list[tuple[Tensor, ...]] = []

    def dispatch_push() -> None:
        for rank in ranks:
            rank.transport.dispatch_push(rank.x, rank.experts, rank.probs, num_local)

    def dispatch_receive() -> None:
        dispatched[:] = [rank.transport.dispatch_receive(rank.x, rank.experts, rank.probs, num_local, 1) for rank in ranks]

    def combine_push() -> None:
        for rank, (rows, _, _, map) in zip(ranks, dispatched, strict=True):
            rank.transport.combine_push(rows, map, rank.experts, num_local)

    def combine_receive() -> None:
        for rank, (rows, *_) in zip(ranks, dispatched, strict=True):
            rank.transport.combine_receive(rows, rank.experts, num_local)

    return [dispatch_push, dispatch_receive, combine_push, combine_receive]


def as_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Replays what `function` launches, without Python's time between the launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_ms(function: Callable[[], object], device: torch.device) -> float:
    """On a GPU the time between events on its stream."""
    if device.type != "cuda":
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
