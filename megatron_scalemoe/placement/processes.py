"""`run_jobs`: independent searches, one per layer, on several processes.

Processes are forked (Linux), and only where torch is not loaded: a fork of a training process, with its CUDA context and threads, is not
safe. Elsewhere the jobs run one after another in this process. Each job has one BLAS thread, wherever it runs: processes use all cores, and
the last bits of a sum depend on the threads.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from megatron_scalemoe.environment import usable_cores
from megatron_scalemoe.errors import ScaleMoEError

Result = TypeVar("Result")

# More would gain little on a login node, and each holds its own arrays.
_MOST_PROCESSES = 8
_PR_SET_PDEATHSIG = 1


def run_jobs(
    job: Callable[..., Result],
    arguments: Sequence[tuple],
    *,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """[job(*arguments[0]), job(*arguments[1])...]. `job` is a function of a module.

    processes: default as many as there are jobs and cores, where forking is safe. progress: called here with (jobs done, jobs in all).
    An exception of a job is raised here, and stops the others; so does Ctrl-C. Processes die with this one.
    """
    processes = processes or default_processes(len(arguments))
    results: list = [None] * len(arguments)
    source = _here(job, arguments) if processes == 1 else _forked(job, arguments, processes)
    with contextlib.closing(source):
        for done, (index, result) in enumerate(source, 1):
            results[index] = result
            if progress:
                progress(done, len(arguments))
    return results


def default_processes(count: int) -> int:
    """As many as there are jobs and cores, where forking is safe; else 1."""
    if sys.platform != "linux" or "torch" in sys.modules or multiprocessing.current_process().daemon:
        return 1
    return max(1, min(count, usable_cores(), _MOST_PROCESSES))


def one_blas_thread() -> contextlib.AbstractContextManager:
    """From now on, or until the context ends."""
    from threadpoolctl import threadpool_limits  # sets an environment variable when it is imported

    return threadpool_limits(limits=1, user_api="blas")


def _here(job: Callable[..., Result], arguments: Sequence[tuple]) -> Iterator[tuple[int, Result]]:
    for index, given in enumerate(arguments):
        with one_blas_thread():
            yield index, job(*given)


def _forked(job: Callable[..., Result], arguments: Sequence[tuple], processes: int) -> Iterator[tuple[int, Result]]:
    context = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (os.getpid(),))
    try:
        index_of = {pool.submit(job, *given): index for index, given in enumerate(arguments)}
        for done in concurrent.futures.as_completed(index_of):
            yield index_of[done], done.result()
    except BrokenProcessPool:
        raise ScaleMoEError("a planning process died", try_="less memory: fewer processes") from None
    finally:
        # Nobody wants what is still being searched: with an error, or after Ctrl-C.
        for process in (pool._processes or {}).values():
            process.kill()
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    """At the start of each process: it ends with its parent, which alone listens to Ctrl-C."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    one_blas_thread()
