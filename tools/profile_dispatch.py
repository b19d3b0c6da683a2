"""Where a dispatch spends its CPU time: user and system time and page faults of each stage, summed over the ranks, per iteration.

OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 4 -- tools/profile_dispatch.py
"""

import resource

import torch
import torch.distributed as dist

from megatron_scalemoe.bench.routed_tokens import make_routed_tokens
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.mcore import cpu_ranks

TOKENS, HIDDEN, EXPERTS, TOP_K, SKEW, DTYPE = 4096, 1024, 8, 2, 1.0, torch.float32  # as `scalemoe bench dispatch`
WARMUP, ITERS = 2, 10


class StageTimes:
    """Adds up the resource usage of named stages."""

    def __init__(self) -> None:
        self.totals: dict[str, torch.Tensor] = {}

    def run(self, name: str, stage, *args):
        dist.barrier()
        before = _usage()
        result = stage(*args)
        self.totals[name] = self.totals.get(name, torch.zeros(3, dtype=torch.float64)) + _usage() - before
        return result


def _usage() -> torch.Tensor:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return torch.tensor([used.ru_utime * 1e3, used.ru_stime * 1e3, used.ru_minflt], dtype=torch.float64)


def one_iteration(dispatcher: RaggedDispatcher, routed, times: StageTimes) -> None:
    """Forward and backward, stage by stage: detaching between stages lets autograd run them one at a time."""
    x, probs = routed.x.requires_grad_(), routed.probs.requires_grad_()
    flight = times.run("prepare", dispatcher.prepare, x, probs, routed.routing_map)
    flight = times.run("exchange", dispatcher.exchange, flight)
    rows, _, row_probs, metadata = times.run("expand", dispatcher.expand, flight)
    del flight
    outputs = rows.detach().requires_grad_()
    reduced = times.run("reduce", dispatcher.reduce, outputs, metadata)
    returned = times.run("exchange back", dispatcher.exchange_back, reduced, metadata)
    y = times.run("restore", dispatcher.restore, returned, metadata)
    gradient = torch.ones_like(y)
    for name, result, source in (("restore", y, returned), ("exchange back", returned, reduced), ("reduce", reduced, outputs)):
        (gradient,) = times.run(f"{name}, backward", torch.autograd.grad, result, source, gradient)
    del y, returned, reduced, outputs
    times.run("expand to prepare, backward", torch.autograd.grad, [rows, row_probs], [x, probs], [gradient, torch.ones_like(row_probs)])


def main() -> None:
    cpu_ranks.install()
    dist.init_process_group("gloo")
    dispatcher = RaggedDispatcher(dist.group.WORLD, EXPERTS, TOP_K)
    routed = make_routed_tokens(TOKENS, HIDDEN, EXPERTS, TOP_K, SKEW, DTYPE, dist.get_rank(), torch.device("cpu"))
    times = StageTimes()
    for iteration in range(WARMUP + ITERS):
        if iteration == WARMUP:
            times.totals.clear()
        one_iteration(dispatcher, routed, times)
    for total in times.totals.values():
        dist.all_reduce(total)
    if dist.get_rank() == 0:
        print(f"{'stage':28} {'user ms':>8} {'system ms':>10} {'page faults':>12}")
        for name, total in {**times.totals, "sum": sum(times.totals.values())}.items():
            user_ms, system_ms, faults = (total / ITERS).tolist()
            print(f"{name:28} {user_ms:8.1f} {system_ms:10.1f} {faults:12,.0f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
