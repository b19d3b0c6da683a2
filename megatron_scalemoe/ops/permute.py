"""Row permutation with repetition, and its transpose.

`permute` copies rows (one row may go to several places); `unpermute` sums them back. Each is the other's gradient, so both directions of
both passes cost one gather or one segmented sum. Plain CPU tensors are permuted by the native library, if there is one; all others, and
what is traced, in plain torch, with the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import torch
from torch import Tensor

from megatron_scalemoe.ops import native, pool
from megatron_scalemoe.ops.autograd import on_plain_cpu, refuse_second_derivative

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
    if (library := native_for(index_M)) is None:
        if on_plain_cpu(index_M) and index_M.numel():
            _check_index(int(index_M.min()) >= 0 and int(index_M.max()) < num_rows)
        return RowMap(index_M, *plain_row_map(index_M, num_rows))
    index_M = index_M.contiguous()
    order_M, offsets = torch.empty_like(index_M), torch.empty(num_rows + 1, dtype=torch.int64)
    code = library.scalemoe_row_map(index_M.data_ptr(), index_M.numel(), num_rows, order_M.data_ptr(), offsets.data_ptr())
    _check_index(code == 0)
    return RowMap(index_M, order_M, offsets)


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


def _gather(x_ND: Tensor, rows: RowMap) -> Tensor:
    assert x_ND.dim() == 2 and x_ND.shape[0] == rows.num_rows, (x_ND.shape, rows.num_rows)
    num_permuted, row_bytes = rows.index_M.numel(), x_ND.shape[1] * x_ND.element_size()
    library = native_for(x_ND)
    if library is None or num_permuted * row_bytes < NATIVE_GATHER_BYTES:
        return x_ND.index_select(0, rows.index_M)
    x_ND, index_M = _rows_together(x_ND), rows.index_M.contiguous()
    out = pool.empty((num_permuted, x_ND.shape[1]), x_ND.dtype)
    source = x_ND.data_ptr(), x_ND.stride(0) * x_ND.element_size()
    sizes = num_permuted, rows.num_rows, row_bytes, torch.get_num_threads()
    _check_index(library.scalemoe_gather_rows(out.data_ptr(), *source, index_M.data_ptr(), *sizes) == 0)
    return out


def _sum(x_MD: Tensor, rows: RowMap) -> Tensor:
    assert x_MD.dim() == 2 and x_MD.shape[0] == rows.index_M.numel(), (x_MD.shape, rows.index_M.shape)
    library, columns = native_for(x_MD), x_MD.shape[1]
    if library is None or x_MD.dtype not in DTYPE_CODES or rows.num_rows * columns == 0:
        return plain_sum(x_MD, rows)
    x_MD, order_M, offsets = _rows_together(x_MD), rows.order_M.contiguous(), rows.offsets.contiguous()
    out = pool.empty((rows.num_rows, columns), x_MD.dtype)
    source = x_MD.data_ptr(), x_MD.stride(0) * x_MD.element_size()
    sizes = order_M.numel(), rows.num_rows, columns, DTYPE_CODES[x_MD.dtype], torch.get_num_threads()
    _check_index(library.scalemoe_sum_rows(out.data_ptr(), *source, order_M.data_ptr(), offsets.data_ptr(), *sizes) == 0)
    return out


def plain_row_map(index_M: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`order_M` and `offsets` in plain torch."""
    order_M = torch.argsort(index_M, stable=True)
    starts = torch.arange(num_rows + 1, device=index_M.device)
    return order_M, torch.searchsorted(index_M[order_M], starts)


def plain_sum(x_MD: Tensor, rows: RowMap) -> Tensor:
    """The segmented sum in plain torch. bf16 on the CPU is slower than it could be: embedding_bag would round its ties away from zero."""
    wide = x_MD.float() if x_MD.dtype == torch.bfloat16 and not x_MD.is_cuda else x_MD.contiguous()
    # embedding_bag is PyTorch's segmented gather-sum: one pass over the rows, on CPU and CUDA
    sums = torch.nn.functional.embedding_bag(rows.order_M, wide, rows.offsets, mode="sum", include_last_offset=True)
    return sums.to(x_MD.dtype)


def native_for(x: Tensor) -> ctypes.CDLL | None:
    """The native library, if there is one and it may read this tensor."""
    return native_library() if on_plain_cpu(x) else None


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


def _rows_together(x: Tensor) -> Tensor:
    """x if the items of each row lie side by side, else a contiguous copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _check_index(is_right: bool) -> None:
    if not is_right:
        raise IndexError("a row map points outside of its rows")
