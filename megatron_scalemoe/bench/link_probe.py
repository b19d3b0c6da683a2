"""The ranks of `scalemoe topology measure`: times messages between all pairs of ranks, one pair at a time. Run by torchrun, several nodes
too: `torchrun ... -m megatron_scalemoe.bench.link_probe --result-file probe.json`. NCCL where there are GPUs, gloo otherwise.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import pathlib
import statistics
import time

import torch
import torch.distributed as dist

from megatron_scalemoe.bench.worker import run_worker, synchronize

DEFAULT_SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
# The answer to each message: as small as can be, so that its time is latency alone.
ACK_BYTES = 1
VISITS = 5


def main() -> None:
    args = _parse_args()
    measure = functools.partial(probe_pairs, args.sizes, iters=args.iters, warmup=args.warmup)
    run_worker(measure, args.result_file, args.timeout)


def probe_pairs(sizes: list[int], *, iters: int, warmup: int) -> dict:
    """Collective. On every rank: `pairs` (source, destination, bytes, time_us: one way, typical), `node_of_rank`, `backend`, `device`.

    A round is a message and a small answer; half of the fastest round with a message of the answer's size is taken off for the answer. So
    the directions of a pair are told apart without a common clock, save for the latency, which both share.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    # Each pair is visited several times, and each visit goes through all sizes: a slow moment of the machine spoils little of any size.
    round_us: dict[tuple[int, int], list[list[float]]] = {}
    for _ in range(VISITS):
        for source, destination in itertools.permutations(range(ranks), 2):
            dist.barrier()  # the others are silent meanwhile
            if rank in (source, destination):
                samples = round_us.setdefault((source, destination), [[] for _ in (ACK_BYTES, *sizes)])
                for of_size, size in zip(samples, (ACK_BYTES, *sizes), strict=True):
                    of_size += _round_trips_us(source, destination, size, device, math.ceil(iters / VISITS), warmup)
    time_us_GGS = torch.zeros(ranks, ranks, len(sizes), dtype=torch.float64)
    for (source, destination), (of_answer, *samples) in round_us.items():
        if rank == source:
            fastest = min(of_answer)  # no message is faster than the answer; with few rounds on a busy machine it can look so
            times = [max(_lower_quartile(of_size), fastest) - fastest / 2 for of_size in samples]
            time_us_GGS[source, destination] = torch.tensor(times, dtype=torch.float64)
    node_G = torch.zeros(ranks, dtype=torch.float64)
    node_G[rank] = int(os.environ.get("GROUP_RANK", 0))  # the number of torchrun's agent, one per node
    return {
        "pairs": [
            {"source": source, "destination": destination, "bytes": list(sizes), "time_us": times.tolist()}
            for source, row in enumerate(_summed(time_us_GGS, device))
            for destination, times in enumerate(row)
            if source != destination
        ],
        "node_of_rank": [int(node) for node in _summed(node_G, device)],
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }


def _summed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Over all ranks, on the CPU."""
    on_device = values.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def _lower_quartile(times: list[float]) -> float:
    """What a link does when nothing is in the way: a busy CPU only ever delays, on a loaded machine more than half of the rounds."""
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else times[0]


def _round_trips_us(source: int, destination: int, size: int, device: torch.device, iters: int, warmup: int) -> list[float]:
    """Times of messages of `size` bytes and their answers, as the calling end sees them."""
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    answer = torch.zeros(ACK_BYTES, dtype=torch.uint8, device=device)
    sends = dist.get_rank() == source
    times = []
    for _ in range(warmup + iters):
        synchronize()
        start = time.perf_counter()
        if sends:
            dist.send(message, destination)
            dist.recv(answer, destination)
        else:
            dist.recv(message, source)
            dist.send(answer, source)
        synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return times[warmup:]


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(DEFAULT_SIZES), metavar="BYTES")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("--result-file", type=pathlib.Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
