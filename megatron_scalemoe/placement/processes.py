"""`run_jobs`: independent searches, one per layer, on several processes within one time budget.

Processes are forked (Linux), so that nothing is copied to them, and only where torch is not loaded: a fork of a training process, with its
CUDA context and threads, is not safe. Elsewhere the jobs run one after another in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TypeVar

from megatron_scalemoe.environment import usable_cores
from megatron_scalemoe.errors import ScaleMoEError

Result = TypeVar("Result")
Job = Callable[[int, float], Result]

# More would gain little on a login node, and each holds its own arrays.
_MOST_PROCESSES = 8
# Forking and returning results take about this long; a shorter budget is better spent here.
_LEAST_SECONDS = 0.2


def run_jobs(
    job: Job, count: int, *, deadline: float, processes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> list:
    """[job(0, seconds), job(1, seconds)...]: each job may take `seconds`, an equal share of what is left until `deadline`.

    deadline: a `time.monotonic()` value. progress: called here with (jobs done, jobs in all). An exception of a job is raised here, and
    stops the others; so does Ctrl-C.
    """
    if processes is None:
        processes = default_processes(count, deadline - time.monotonic())
    results: list = [None] * count
    source = _here(job, range(count), deadline) if processes == 1 else _forked(job, count, deadline, processes)
    with contextlib.closing(source):
        for done, (index, result) in enumerate(source, 1):
            results[index] = result
            if progress:
                progress(done, count)
    return results


def default_processes(count: int, seconds: float) -> int:
    """As many as there are jobs and cores, where forking is safe and the time is worth it; else 1."""
    if sys.platform != "linux" or "torch" in sys.modules or seconds < _LEAST_SECONDS or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(count, usable_cores(), _MOST_PROCESSES))


def _here(job: Job, indices: range, deadline: float) -> Iterator[tuple[int, object]]:
    for done, index in enumerate(indices):
        left = max(0.0, deadline - time.monotonic())
        yield index, job(index, left / (len(indices) - done))


def _forked(job: Job, count: int, deadline: float, processes: int) -> Iterator[tuple[int, object]]:
    context = multiprocessing.get_context("fork")
    pipes: dict[Connection, multiprocessing.process.BaseProcess] = {}
    try:
        for first in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(job, range(first, count, processes), deadline, theirs), daemon=True)
            worker.start()
            # Only the worker may hold this end: its death must be an end of file here.
            theirs.close()
            pipes[ours] = worker
        while pipes:
            for pipe in wait(list(pipes)):
                try:
                    index, result = pipe.recv()
                except EOFError:
                    worker = pipes.pop(pipe)
                    worker.join()
                    if worker.exitcode:
                        raise ScaleMoEError(
                            "a planning process died", found=f"exit code {worker.exitcode}", try_="less memory: fewer processes"
                        ) from None
                    continue
                if isinstance(result, BaseException):
                    raise result
                yield index, result
    finally:
        for worker in pipes.values():
            worker.terminate()
            worker.join()


def _work(job: Job, indices: range, deadline: float, pipe: Connection) -> None:
    use_one_blas_thread()
    try:
        for index, result in _here(job, indices, deadline):
            pipe.send((index, result))
    except (KeyboardInterrupt, BrokenPipeError):
        # The parent was interrupted, or is gone: nobody wants the results, or a traceback.
        os._exit(1)
    except Exception as error:
        pipe.send((-1, error))


def use_one_blas_thread() -> None:
    """The processes use all cores: BLAS threads of each would wait for one another, spinning (measured: half the search is lost).

    Does what the package threadpoolctl does for OpenBLAS, which the wheels of numpy and scipy bring, each its own under such names.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    for path in {line.split(maxsplit=5)[5] for line in maps if "openblas" in line}:
        for name in ("openblas_set_num_threads", "scipy_openblas_set_num_threads"):
            for suffix in ("", "64_"):
                with contextlib.suppress(AttributeError, OSError):
                    getattr(ctypes.CDLL(path), name + suffix)(1)
