"""Persistent ranks for distributed tests: real processes over gloo, started once per world size, with a hard timeout per task.

A test calls `pool(world_size).run(fn, *args)`: every rank calls the module-level function `fn(*args)` and the list of results, in rank
order, comes back. A rank's exception fails the test with its traceback; a rank that dies or hangs kills the pool, and the next call starts
a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import pathlib
import queue
import tempfile
import time
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TASK_TIMEOUT_S = 120
COLLECTIVE_TIMEOUT_S = 30
STORE_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # the ranks poll the file: three times faster than a disk
_pools: dict[int, RankPool] = {}


class RankFailed(AssertionError):
    """A rank raised, died, or did not answer in time."""


class RankPool:
    """Owns `world_size` processes, their queues and their rendezvous file."""

    def __init__(self, world_size: int):
        context = mp.get_context("spawn")
        self.store = pathlib.Path(tempfile.mkdtemp(prefix="scalemoe-test-", dir=STORE_FOLDER)) / "store"
        self.tasks = [context.Queue() for _ in range(world_size)]
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_serve, args=(rank, world_size, str(self.store), self.tasks[rank], self.results), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, fn, *args, timeout_s: float = TASK_TIMEOUT_S) -> list:
        for task in self.tasks:
            task.put((fn, args))
        results, deadline = {}, time.monotonic() + timeout_s
        while len(results) < len(self.processes):
            with contextlib.suppress(queue.Empty):
                rank, error, value = self.results.get(timeout=0.2)
                if error is not None:
                    self.close()  # the other ranks may be waiting in a collective
                    raise RankFailed(f"rank {rank} of {len(self.processes)} failed in {_name(fn)}:\n{error}")
                results[rank] = value
                continue
            dead = [rank for rank, process in enumerate(self.processes) if not process.is_alive() and rank not in results]
            if dead or time.monotonic() > deadline:
                missing = sorted(set(range(len(self.processes))) - set(results))
                self.close()
                raise RankFailed(f"{_name(fn)}: ranks {missing} gave no result within {timeout_s} s (dead: {dead})")
        return [results[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.store.unlink(missing_ok=True)
        self.store.parent.rmdir()
        _pools.pop(len(self.processes), None)


def pool(world_size: int) -> RankPool:
    """The running pool of this size, started on first use."""
    if world_size not in _pools:
        _pools[world_size] = RankPool(world_size)
    return _pools[world_size]


@atexit.register
def close_pools() -> None:
    for running in list(_pools.values()):
        running.close()


def _serve(rank: int, world_size: int, store: str, tasks, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout)
    while True:
        fn, args = tasks.get()
        try:
            results.put((rank, None, fn(*args)))
        except BaseException:
            results.put((rank, traceback.format_exc(), None))


def _name(fn) -> str:
    return getattr(fn, "__name__", None) or repr(fn)  # a partial has none
