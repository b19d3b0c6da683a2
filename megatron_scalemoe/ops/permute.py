"""Row permutation with repetition, and its transpose.

`permute` copies rows (one row may go to several places); `unpermute` sums them back. Each is the other's gradient, so both directions of
both passes cost one gather or one segmented sum. They are torch ops, `torch.ops.scalemoe.gather_rows`, `sum_rows` and `row_map`: on the
CPU by the native library, if there is one, otherwise in plain torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from megatron_scalemoe.ops import native, pool
from megatron_scalemoe.ops.define import define_op, on_plain_cpu, refuse_second_derivative

# Smaller results: torch's own gather is as fast, and the C library has memory at hand.
NATIVE_GATHER_BYTES = 8 << 20
# Codes of the C interfaces.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclasses.dataclass(frozen=True, slots=True)
class RowMap:
    """Which source row each permuted row is a copy of, and the same by source row.

    index_M: int64, source row of permuted row m. order_M: int64, permuted rows grouped by source row, ascending inside a group.
    offsets: int64 [num_rows + 1], where each source row's group starts in `order_M`.
    """

    index_M: Tensor
    order_M: Tensor
    offsets: Tensor

    @property
    def num_rows(self) -> int:
        return self.offsets.numel() - 1


def row_map(index_M: Tensor, num_rows: int) -> RowMap:
    """The `RowMap` of an int64 index with values in [0, num_rows). No host synchronisation. IndexError for other values on the CPU."""
    make = _cpu_row_map if on_plain_cpu(index_M) else torch.ops.scalemoe.row_map
    return RowMap(index_M, *make(index_M, num_rows))


def permute(x_ND: Tensor, rows: RowMap) -> Tensor:
    """`x_ND[rows.index_M]`: [num_rows, D] -> [M, D], any float dtype. The gradient of a source row is the sum of its copies' gradients."""
    return _Permute.apply(x_ND, rows)


def unpermute(x_MD: Tensor, rows: RowMap) -> Tensor:
    """Sum of each source row's copies: [M, D] -> [num_rows, D]; zero where a source row has none.

    Sums in fp32 (fp64 for fp64) in ascending order of m and rounds once, so the result does not depend on the number of threads.
    """
    return _Unpermute.apply(x_MD, rows)


def sum_rows(x_MD: Tensor, rows: RowMap) -> Tensor:
    """`unpermute` without autograd."""
    with torch.no_grad():
        return _sum(x_MD, rows)


def _gather(x_ND: Tensor, rows: RowMap) -> Tensor:
    assert x_ND.dim() == 2 and x_ND.shape[0] == rows.num_rows, (x_ND.shape, rows.num_rows)
    if on_plain_cpu(x_ND):
        return _cpu_gather_rows(x_ND, rows.index_M, rows.order_M, rows.offsets)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.scalemoe.gather_rows(x_ND, rows.index_M, rows.order_M, rows.offsets)


def _sum(x_MD: Tensor, rows: RowMap) -> Tensor:
    assert x_MD.dim() == 2 and x_MD.shape[0] == rows.index_M.numel(), (x_MD.shape, rows.index_M.shape)
    if on_plain_cpu(x_MD):
        return _cpu_sum_rows(x_MD, rows.index_M, rows.order_M, rows.offsets)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.scalemoe.sum_rows(x_MD, rows.index_M, rows.order_M, rows.offsets)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, rows):
        ctx.rows = rows
        return _gather(x_ND, rows)

    @staticmethod
    def backward(ctx, grad_MD):
        refuse_second_derivative()
        return _sum(grad_MD, ctx.rows), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, rows):
        ctx.rows = rows
        return _sum(x_MD, rows)

    @staticmethod
    def backward(ctx, grad_ND):
        refuse_second_derivative()
        return _gather(grad_ND, ctx.rows), None


# ---- without the native library ----


def plain_row_map(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`order_M` and `offsets` in plain torch."""
    order = torch.argsort(index, stable=True)
    starts = torch.arange(num_rows + 1, device=index.device)
    return order, torch.searchsorted(index[order], starts)


def plain_gather_rows(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The gather in plain torch."""
    return x.index_select(0, index)


def plain_sum_rows(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The segmented sum in plain torch. bf16 on the CPU is slower than it could be: embedding_bag would round its ties away from zero."""
    wide = x.float() if x.dtype == torch.bfloat16 and not x.is_cuda else x.contiguous()
    # embedding_bag is PyTorch's segmented gather-sum: one pass over the rows, on CPU and CUDA
    sums = torch.nn.functional.embedding_bag(order, wide, offsets, mode="sum", include_last_offset=True)
    return sums.to(x.dtype)


# ---- by the native library, on the CPU ----


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The native CPU library with the argument types of csrc/cpu/permute.cpp, or None."""
    library = native.cpu()
    if library is not None:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.scalemoe_gather_rows.argtypes = [pointer, pointer, size, pointer, size, size, size, number]
        library.scalemoe_sum_rows.argtypes = [pointer, pointer, size, pointer, pointer, size, size, size, number, number]
        library.scalemoe_row_map.argtypes = [pointer, size, size, pointer, pointer]
        library.scalemoe_route.argtypes = [pointer, pointer, number, size, size, size, pointer, pointer, pointer, number]
        library.scalemoe_unroute.argtypes = [pointer, pointer, number, size, size, size, pointer, number]
    return library


def _cpu_row_map(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    library = native_library()
    if library is None:
        if index.numel():
            _check_index(int(index.min()) >= 0 and int(index.max()) < num_rows)
        return plain_row_map(index, num_rows)
    index = index.contiguous()
    order, offsets = torch.empty_like(index), torch.empty(num_rows + 1, dtype=torch.int64)
    code = library.scalemoe_row_map(index.data_ptr(), index.numel(), num_rows, order.data_ptr(), offsets.data_ptr())
    _check_index(code == 0)
    return order, offsets


def _cpu_gather_rows(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    library = native_library()
    num_rows, columns = x.shape
    row_bytes = columns * x.element_size()
    if library is None or index.numel() * row_bytes < NATIVE_GATHER_BYTES:
        return plain_gather_rows(x, index, order, offsets)
    x, index = _rows_together(x), index.contiguous()
    out = pool.empty((index.numel(), columns), x.dtype)
    stride = x.stride(0) * x.element_size()
    code = library.scalemoe_gather_rows(
        out.data_ptr(), x.data_ptr(), stride, index.data_ptr(), index.numel(), num_rows, row_bytes, torch.get_num_threads()
    )
    _check_index(code == 0)
    return out


def _cpu_sum_rows(x: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    library = native_library()
    num_rows, columns = offsets.numel() - 1, x.shape[1]
    if library is None or x.dtype not in DTYPE_CODES or num_rows * columns == 0:
        return plain_sum_rows(x, index, order, offsets)
    x, order, offsets = _rows_together(x), order.contiguous(), offsets.contiguous()
    out = pool.empty((num_rows, columns), x.dtype)
    source = x.data_ptr(), x.stride(0) * x.element_size()
    sizes = order.numel(), num_rows, columns, DTYPE_CODES[x.dtype]
    code = library.scalemoe_sum_rows(out.data_ptr(), *source, order.data_ptr(), offsets.data_ptr(), *sizes, torch.get_num_threads())
    _check_index(code == 0)
    return out


def _rows_together(x: Tensor) -> Tensor:
    """x if the items of each row lie side by side, else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _check_index(is_right: bool) -> None:
    if not is_right:
        raise IndexError("a row map points outside of its rows")


# ---- as torch ops ----


define_op(
    "row_map(Tensor index, SymInt num_rows) -> (Tensor, Tensor)",
    cuda=plain_row_map,
    cpu=_cpu_row_map,
    fake=lambda index, num_rows: (torch.empty_like(index), index.new_empty(num_rows + 1)),
)
define_op(
    "gather_rows(Tensor x, Tensor index, Tensor order, Tensor offsets) -> Tensor",
    cuda=plain_gather_rows,
    cpu=_cpu_gather_rows,
    fake=lambda x, index, order, offsets: x.new_empty(index.shape[0], x.shape[1]),
    autograd=lambda x, *maps: _Permute.apply(x, RowMap(*maps)),
)
define_op(
    "sum_rows(Tensor x, Tensor index, Tensor order, Tensor offsets) -> Tensor",
    cuda=plain_sum_rows,
    cpu=_cpu_sum_rows,
    fake=lambda x, index, order, offsets: x.new_empty(offsets.shape[0] - 1, x.shape[1]),
    autograd=lambda x, *maps: _Unpermute.apply(x, RowMap(*maps)),
)
