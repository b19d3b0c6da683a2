"""Memory that CPU ranks of one host share (csrc/cpu): how it is opened, what becomes of it, and what went wrong with it.

It has no name and vanishes with the ranks, whatever ends them. A rank that dies, hangs, leaves or raises ends it on all ranks with an error
that names it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native

OPS = ("no op", "gather_counts", "dispatch", "combine", "combine_backward", "dispatch_backward")
# What ranks compare at the barrier of an op, in the order of csrc/cpu/arena.h.
COMPARED = ("op", "number of ops before", "state", "bytes of a row", "dtype", "bytes of a probability or count", "columns", "num_local")
NO_MEMORY, NOT_MAPPED = 6, 7  # failures by which open_arena learns that there can be no shared memory
DONE, FAILED, BAD_EXPERTS, BAD_MAP, TOO_MANY_ROWS = 0, -1, -2, -3, -4
DIED = "died while the ranks met"  # not a reason to go on without shared memory
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")

Exchange = Callable[[object], list]


class ShmUnavailable(ScaleMoEError):
    """These ranks cannot share memory; all of them get this error, with the reason."""


def this_host() -> str:
    """The same text on ranks that can share memory: they run under the same kernel and see each other's processes."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(PID_NAMESPACE)}"
    except OSError:
        return platform.node()


class Arena:
    """Owns this rank's part of the shared memory of a group. One op at a time; in a forked child it cannot be used."""

    def __init__(self, handle: int, rank: int, ranks: Sequence[int], timeout_s: float):
        self.rank, self.ranks, self.timeout_s = rank, tuple(ranks), timeout_s
        self._handle, self._pid, self._lock = handle, os.getpid(), threading.Lock()
        self._finalizer = weakref.finalize(self, shm_library().scalemoe_shm_close, handle)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @contextlib.contextmanager
    def op(self):
        """The only place to `call`. Any error inside ends the arena on all ranks, which would otherwise wait for this one."""
        with self._lock:
            if not self._finalizer.alive:
                raise ScaleMoEError("the shared-memory transport is closed")
            if os.getpid() != self._pid:
                raise ScaleMoEError("the shared-memory transport belongs to the process that opened it", found="a forked child of it")
            try:
                yield
            except BaseException:
                shm_library().scalemoe_shm_fail(self._handle)
                raise

    def call(self, name: str, *args) -> None:
        """Calls `scalemoe_shm_<name>`; tensors go as pointers. Raises `ScaleMoEError` unless it succeeds."""
        pointers = (arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
        outcome = getattr(shm_library(), f"scalemoe_shm_{name}")(self._handle, *pointers)
        if outcome == FAILED:
            raise self._error(*self.failure())
        if outcome == BAD_EXPERTS:
            raise ScaleMoEError("experts must hold each token's slots in ascending order, then -1, and no slot beyond the group's last")
        if outcome == BAD_MAP:
            raise ScaleMoEError("map must be what dispatch returned for these rows and experts on this transport")
        if outcome == TOO_MANY_ROWS:
            raise ScaleMoEError("one rank can get at most 2**31 - 1 rows", try_="smaller micro-batches, or more ranks")
        assert outcome == DONE, outcome

    def failure(self) -> tuple[int, int, int, int, int]:
        """(failure, culprit, reporter, detail, op) of the first failure on any rank; all 0 before."""
        report = (ctypes.c_int64 * 5)()
        shm_library().scalemoe_shm_failure(self._handle, report)
        return tuple(report)

    def close(self) -> None:
        """Gives the memory back; a rank that still waits for this one gets an error. Not collective."""
        with self._lock:
            self._finalizer()

    def _error(self, failure: int, culprit: int, reporter: int, detail: int, op: int) -> ScaleMoEError:
        name = f"rank {self.ranks[culprit]}" if culprit < self.size else "an unknown rank"
        by = f"rank {self.ranks[reporter]}" if reporter < self.size else "an unknown rank"
        where = OPS[op] if op < len(OPS) else "an unknown op"
        problems = (
            "the shared memory between the ranks is corrupt",
            f"{name} died",
            f"{name} closed its transport while the others went on",
            f"{name} did not come to {where} within {self.timeout_s:g} s: it hangs, or does something else",
            f"{name} called another op than the others, or with other sizes: {COMPARED[detail] if detail < len(COMPARED) else '?'} differs",
            f"what {name} put into shared memory makes no sense",
            f"{name} could not get shared memory: {os.strerror(detail)}",
            f"the shared memory of {name} could not be opened: {os.strerror(detail)}",
            f"{name} raised an error of its own",
        )
        return ScaleMoEError(
            f"{problems[failure if failure < len(problems) else 0]}; rows can no longer be exchanged",
            found=f"noticed by {by} in {where}, ranks {list(self.ranks)}",
            try_=f"look at the output of {name} for what came first",
        )


def open_arena(rank: int, ranks: Sequence[int], exchange: Exchange, timeout_s: float) -> Arena:
    """Collective: shared memory for the ranks of a group, all of one host and with the native library. rank: this one's place in it.

    ranks: their names in errors. exchange(obj) gives everyone's obj, in rank order. A rank that stays away from an op longer than timeout_s
    is an error. Raises `ShmUnavailable` on all ranks alike, and whatever `exchange` raises.
    """
    token = (ctypes.c_uint64 * 2)(*(secrets.randbits(64) for _ in range(2)))
    fd, me = _introduce_self(rank, len(ranks), token)
    arena = None
    try:
        everyone = exchange(me)
        _agree([other["problem"] for other in everyone], ranks)
        arena, problem = _open(rank, ranks, everyone, timeout_s)
        _agree(exchange(problem), ranks)
        _agree(exchange(_try_out(arena)), ranks)
    except BaseException:
        if arena is not None:
            arena.close()
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    return arena


def _introduce_self(rank: int, size: int, token) -> tuple[int, dict]:
    """The control segment's descriptor on rank 0, -1 elsewhere, and what the others must know of this rank."""
    fd, failed = ctypes.c_int(-1), 0
    if rank == 0:
        failed = shm_library().scalemoe_shm_create_control(size, token, ctypes.byref(fd))
    start_time = shm_library().scalemoe_shm_start_time(os.getpid())
    problem = f"no shared memory: {os.strerror(failed)}" if failed else None
    if start_time <= 0:
        problem = "/proc/self/stat cannot be read"
    return fd.value, {"pid": os.getpid(), "start_time": start_time, "token": list(token), "fd": fd.value, "problem": problem}


def _open(rank: int, ranks: Sequence[int], everyone: list[dict], timeout_s: float) -> tuple[Arena | None, str | None]:
    pids, start_times = ((ctypes.c_int64 * len(ranks))(*(other[key] for other in everyone)) for key in ("pid", "start_time"))
    token = (ctypes.c_uint64 * 2)(*everyone[0]["token"])
    handle = ctypes.c_void_p()
    fd = everyone[0]["fd"]
    failed = shm_library().scalemoe_shm_open(rank, len(ranks), pids, start_times, fd, token, timeout_s, ctypes.byref(handle))
    if not failed:
        return Arena(handle.value, rank, ranks, timeout_s), None
    if failed == errno.ESRCH:
        return None, f"rank {ranks[0]} {DIED}"
    return None, f"the memory of rank {ranks[0]} could not be opened: {os.strerror(failed)}"


def _agree(problems: list[str | None], ranks: Sequence[int]) -> None:
    for problem in filter(None, problems):
        if problem.endswith(DIED):
            raise ScaleMoEError(problem)
    found = [f"rank {rank}: {problem}" for rank, problem in zip(ranks, problems, strict=True) if problem]
    if found:
        raise ShmUnavailable("the ranks cannot share memory", found="; ".join(found))


def _try_out(arena: Arena) -> str | None:
    """A first op, which maps everyone's memory everywhere: whether a rank may open another's depends on the system's rules."""
    count, gathered = (ctypes.c_int64 * 1)(), (ctypes.c_int64 * arena.size)()
    try:
        with arena.op():
            arena.call("gather_counts", count, 1, ctypes.sizeof(count), gathered)
    except ScaleMoEError as error:
        if arena.failure()[0] not in (NO_MEMORY, NOT_MAPPED):
            raise
        return str(error)
    return None


@functools.cache
def shm_library() -> ctypes.CDLL:
    """The CPU library, with the signatures of csrc/cpu/shm.cpp."""
    library = native.cpu()
    assert library is not None, native.why_not("cpu")
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    signatures = {
        "start_time": (integer, [integer]),
        "create_control": (ctypes.c_int, [integer, pointer, pointer]),
        "open": (ctypes.c_int, [integer, integer, pointer, pointer, integer, pointer, ctypes.c_double, pointer]),
        "close": (None, [pointer]),
        "fail": (ctypes.c_int, [pointer]),
        "failure": (None, [pointer, pointer]),
        "gather_counts": (ctypes.c_int, [pointer, pointer, integer, integer, pointer]),
        "dispatch_begin": (ctypes.c_int, [pointer] * 5),
        "dispatch_finish": (ctypes.c_int, [pointer] * 5),
        "combine": (ctypes.c_int, [pointer] * 4),
        "combine_backward": (ctypes.c_int, [pointer] * 4),
        "dispatch_backward": (ctypes.c_int, [pointer] * 6),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, f"scalemoe_shm_{name}")
        function.restype, function.argtypes = result, arguments
    return library
