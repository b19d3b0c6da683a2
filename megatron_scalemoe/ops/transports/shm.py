"""The transport of CPU ranks on one host: rows go through memory that the ranks share, without a collective (csrc/cpu).

The memory has no name and vanishes with the ranks, whatever ends them. A rank that dies, hangs, leaves or raises ends the transport on all
ranks with an error that names it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native, pool
from megatron_scalemoe.ops.permute import DTYPE_CODES

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


class _Op(ctypes.Structure):
    """`OpArgs` of csrc/cpu/exchange.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("experts", "map")),
        *((name, ctypes.c_int64) for name in ("tokens", "columns", "num_local", "hidden", "dtype", "value_bytes", "map_ints", "rows")),
        *((name, ctypes.c_int64) for name in ("alignment", "threads")),
    )


class Arena:
    """Owns this rank's part of the shared memory of a group. One op at a time; in a forked child it cannot be used."""

    def __init__(self, handle: int, rank: int, ranks: Sequence[int], timeout_s: float):
        self.rank, self.ranks, self.timeout_s = rank, tuple(ranks), timeout_s
        self._handle, self._pid, self._lock = handle, os.getpid(), threading.Lock()
        self._finalizer = weakref.finalize(self, _library().scalemoe_shm_close, handle)

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
                _library().scalemoe_shm_fail(self._handle)
                raise

    def call(self, name: str, *args) -> None:
        """Calls `scalemoe_shm_<name>`; tensors go as pointers. Raises `ScaleMoEError` unless it succeeds."""
        pointers = (arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args)
        outcome = getattr(_library(), f"scalemoe_shm_{name}")(self._handle, *pointers)
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
        _library().scalemoe_shm_failure(self._handle, report)
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


def open_arena(rank: int, size: int, exchange: Exchange, timeout_s: float, ranks: Sequence[int] | None = None) -> Arena:
    """Collective: shared memory for the ranks 0 to size - 1 of a group, named `ranks` in errors.

    exchange(obj) gives everyone's obj, in rank order. A rank that stays away from an op longer than timeout_s is an error. Raises
    `ShmUnavailable` on all ranks alike, and whatever `exchange` raises.
    """
    ranks = tuple(range(size)) if ranks is None else tuple(ranks)
    token = (ctypes.c_uint64 * 2)(*(secrets.randbits(64) for _ in range(2)))
    fd, me = _introduce_self(rank, size, token)
    arena = None
    try:
        everyone = exchange(me)
        problem = _why_apart(everyone, ranks)
        if problem:  # the same on all ranks
            raise ShmUnavailable("the ranks cannot share memory", found=problem)
        arena, problem = _open(rank, ranks, everyone, timeout_s)
        _agree(exchange(problem), ranks)
        problem = _try_out(arena)
        _agree(exchange(problem), ranks)
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
    fd, me = ctypes.c_int(-1), {"pid": os.getpid(), "token": list(token), "problem": native.why_not("cpu")}
    try:
        me["host"] = [BOOT_ID.read_text().strip(), os.readlink(PID_NAMESPACE)]
    except OSError as error:
        me["problem"] = str(error)
    if me["problem"] is None:
        me["start_time"] = _library().scalemoe_shm_start_time(os.getpid())
        failed = _library().scalemoe_shm_create_control(size, token, ctypes.byref(fd)) if rank == 0 else 0
        if failed or me["start_time"] <= 0:
            me["problem"] = f"no shared memory: {os.strerror(failed)}" if failed else "/proc/self/stat cannot be read"
    me["fd"] = fd.value
    return fd.value, me


def _why_apart(everyone: list[dict], ranks: Sequence[int]) -> str | None:
    for rank, other in zip(ranks, everyone, strict=True):
        if other["problem"]:
            return f"rank {rank}: {other['problem']}"
    for rank, other in zip(ranks, everyone, strict=True):
        if other["host"] != everyone[0]["host"]:
            what = "host" if other["host"][0] != everyone[0]["host"][0] else "pid namespace (container)"
            return f"rank {rank} is on another {what} than rank {ranks[0]}"
    return None


def _open(rank: int, ranks: Sequence[int], everyone: list[dict], timeout_s: float) -> tuple[Arena | None, str | None]:
    pids, start_times = ((ctypes.c_int64 * len(ranks))(*(other[key] for other in everyone)) for key in ("pid", "start_time"))
    token = (ctypes.c_uint64 * 2)(*everyone[0]["token"])
    handle = ctypes.c_void_p()
    fd = everyone[0]["fd"]
    failed = _library().scalemoe_shm_open(rank, len(ranks), pids, start_times, fd, token, timeout_s, ctypes.byref(handle))
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
    try:
        ShmTransport(arena).gather_counts(torch.tensor([arena.rank]))
    except ScaleMoEError as error:
        if arena.failure()[0] not in (NO_MEMORY, NOT_MAPPED):
            raise
        return str(error)
    return None


def open_shm(group: dist.ProcessGroup, timeout_s: float) -> ShmTransport:
    """Collective over the group: its transport. Raises `ShmUnavailable`, on all ranks alike, where they cannot share memory."""

    def exchange(mine: object) -> list:
        gathered: list = [None] * group.size()
        dist.all_gather_object(gathered, mine, group=group)
        return gathered

    return ShmTransport(open_arena(group.rank(), group.size(), exchange, timeout_s, dist.get_process_group_ranks(group)), group)


class ShmTransport:
    """An `ops.transport.Transport`, which see, on an arena, which it owns.

    CPU tensors; rows in float32, bfloat16, float16 or float64, probabilities and counts of 2, 4 or 8 bytes. Results lie in recycled memory
    (`ops.pool`). Errors are `ScaleMoEError`; any of them ends the transport on all ranks.
    """

    name = "shm"

    def __init__(self, arena: Arena, group: dist.ProcessGroup | None = None):
        self.arena, self.group = arena, group

    def gather_counts(self, counts_Q: Tensor) -> Tensor:
        with self.arena.op():
            counts_Q = _checked("counts", counts_Q, (counts_Q.numel(),))
            gathered_GQ = torch.empty((self.arena.size, *counts_Q.shape), dtype=counts_Q.dtype)
            self.arena.call("gather_counts", counts_Q, counts_Q.numel(), counts_Q.element_size(), gathered_GQ)
            return gathered_GQ

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self.arena.op():
            if alignment < 1:
                raise ScaleMoEError("alignment must be at least 1", found=alignment)
            x_TD, op = _op("x", x_TD, len(experts_TK), experts_TK, num_local)
            probs_TK = _checked("probs", probs_TK, tuple(experts_TK.shape))
            op.value_bytes, op.alignment = probs_TK.element_size(), alignment
            sizes = (ctypes.c_int64 * 2)()
            self.arena.call("dispatch_begin", ctypes.byref(op), x_TD, probs_TK, sizes)
            num_rows, map_ints = sizes
            rows_RD = pool.empty((num_rows, x_TD.shape[1]), x_TD.dtype)
            row_probs_R, map = torch.empty(num_rows, dtype=probs_TK.dtype), torch.empty(map_ints, dtype=torch.int32)
            tokens_per_expert = torch.empty(num_local, dtype=torch.int64)
            self.arena.call("dispatch_finish", rows_RD, row_probs_R, tokens_per_expert, map)
            return rows_RD, row_probs_R, tokens_per_expert, map

    def combine(self, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int) -> Tensor:
        with self.arena.op():
            rows_RD, op = _op("rows", rows_RD, len(rows_RD), experts_TK, num_local, map)
            y_TD = pool.empty((op.tokens, op.hidden), rows_RD.dtype)
            self.arena.call("combine", ctypes.byref(op), rows_RD, y_TD)
            return y_TD

    def combine_backward(self, grad_y_TD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, num_rows: int) -> Tensor:
        with self.arena.op():
            grad_y_TD, op = _op("grad_y", grad_y_TD, len(experts_TK), experts_TK, num_local, map)
            op.rows = num_rows
            grad_rows_RD = pool.empty((num_rows, op.hidden), grad_y_TD.dtype)
            self.arena.call("combine_backward", ctypes.byref(op), grad_y_TD, grad_rows_RD)
            return grad_rows_RD

    def dispatch_backward(
        self, grad_rows_RD: Tensor, grad_row_probs_R: Tensor, map: Tensor, experts_TK: Tensor, num_local: int
    ) -> tuple[Tensor, Tensor]:
        with self.arena.op():
            grad_rows_RD, op = _op("grad_rows", grad_rows_RD, len(grad_rows_RD), experts_TK, num_local, map)
            grad_row_probs_R = _checked("grad_row_probs", grad_row_probs_R, (len(grad_rows_RD),))
            op.value_bytes = grad_row_probs_R.element_size()
            grad_x_TD = pool.empty((op.tokens, op.hidden), grad_rows_RD.dtype)
            grad_probs_TK = torch.empty(experts_TK.shape, dtype=grad_row_probs_R.dtype)
            self.arena.call("dispatch_backward", ctypes.byref(op), grad_rows_RD, grad_row_probs_R, grad_x_TD, grad_probs_TK)
            return grad_x_TD, grad_probs_TK

    def close(self) -> None:
        self.arena.close()

    def __enter__(self) -> ShmTransport:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _op(name: str, rows: Tensor, num_rows: int, experts_TK: Tensor, num_local: int, map: Tensor | None = None) -> tuple[Tensor, _Op]:
    """The rows, checked, and the sizes of the op; `value_bytes` and `alignment` are left to the caller."""
    if rows.dim() != 2 or rows.shape[1] == 0 or experts_TK.dim() != 2 or experts_TK.shape[1] == 0 or num_local < 1:
        raise ScaleMoEError(
            f"{name} and experts must have two dimensions with at least one column, and num_local must be at least 1",
            found=f"{name} {tuple(rows.shape)}, experts {tuple(experts_TK.shape)}, num_local={num_local}",
        )
    rows = _checked(name, rows, (num_rows, rows.shape[1]), tuple(DTYPE_CODES))
    experts_TK = _checked("experts", experts_TK, tuple(experts_TK.shape), (torch.int32,))
    op = _Op(experts=experts_TK.data_ptr(), tokens=len(experts_TK), columns=experts_TK.shape[1], num_local=num_local)
    op.hidden, op.dtype, op.rows, op.threads = rows.shape[1], DTYPE_CODES[rows.dtype], num_rows, torch.get_num_threads()
    if map is not None:
        map = _checked("map", map, (map.numel(),), (torch.int32,))
        op.map, op.map_ints = map.data_ptr(), map.numel()
    op.held = experts_TK, map  # what the pointers point to lives as long as they do
    return rows, op


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] | None = None) -> Tensor:
    """The tensor, contiguous. Without dtypes any of 2, 4 or 8 bytes will do."""
    fits = tensor.dtype in dtypes if dtypes else tensor.element_size() in (2, 4, 8) and not tensor.is_complex()
    if tensor.device.type != "cpu" or tuple(tensor.shape) != shape or not fits:
        wanted = " or ".join(map(str, dtypes)) if dtypes else "2, 4 or 8 bytes per item"
        raise ScaleMoEError(
            f"{name} must be a CPU tensor {shape} of {wanted}", found=f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


@functools.cache
def _library() -> ctypes.CDLL:
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
