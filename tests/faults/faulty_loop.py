"""A training loop of four ranks, one of which meets with a fault. test_dead_ranks.py runs it as a function per process, and by torchrun."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults import dead_ranks as faults

RANKS, SURVIVOR_CODE = 4, 3
COLLECTIVE_TIMEOUT_S, ANSWER_S = 5.0, 3.0


def run_rank(rank: int, init_method: str, fault: str, victim: int, log: Path) -> None:
    """What one process does; its output goes to `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faults.EXIT_S = 2.0
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=RANKS)
    loop(fault, victim)


def loop(fault: str, victim: int) -> None:
    """Exits with `SURVIVOR_CODE` after a `ScaleMoEError`, which it prints."""
    torch.set_num_threads(1)
    rank, x = dist.get_rank(), torch.ones(1000)
    dist.barrier()  # a loaded machine may take long to start them all
    group = dist.new_group(timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    try:
        with faults.naming_dead_ranks(ANSWER_S):
            for iteration in range(10_000):
                dist.all_reduce(x, group=group)
                x /= RANKS
                time.sleep(0.05)
                if iteration == 10 and rank == victim:
                    if fault == "finish":
                        break
                    suffer(fault)
    except ScaleMoEError as error:
        print(error, flush=True)
        sys.exit(SURVIVOR_CODE)


def suffer(fault: str) -> None:
    """The fault is `sleep`, `raise`, or the name of a signal."""
    if fault == "sleep":
        time.sleep(1000)
    if fault == "raise":
        raise ValueError("a bug of the user")
    os.kill(os.getpid(), signal.Signals[fault])
    time.sleep(1000)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    loop(sys.argv[1], int(sys.argv[2]))
