"""The transport of CPU ranks on one host: rows go through memory that the ranks share, without a collective (csrc/cpu)."""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import pool
from megatron_scalemoe.ops.permute import DTYPE_CODES
from megatron_scalemoe.ops.ragged import gather_objects
from megatron_scalemoe.ops.transports.shm_memory import Arena, open_arena


def open_shm(group: dist.ProcessGroup, timeout_s: float) -> ShmTransport:
    """Collective over the group, whose ranks are of one host and have the native library: its transport.

    Raises `ShmUnavailable`, on all ranks alike, where they cannot share memory.
    """
    ranks = dist.get_process_group_ranks(group)
    return ShmTransport(open_arena(group.rank(), ranks, lambda mine: gather_objects(mine, group), timeout_s), group)


class _Op(ctypes.Structure):
    """`OpArgs` of csrc/cpu/exchange.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("experts", "map")),
        *((name, ctypes.c_int64) for name in ("tokens", "columns", "num_local", "hidden", "dtype", "value_bytes", "map_ints", "rows")),
        *((name, ctypes.c_int64) for name in ("alignment", "threads")),
    )


class ShmTransport:
    """A `Transport`, which see, on an arena, which it owns.

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
