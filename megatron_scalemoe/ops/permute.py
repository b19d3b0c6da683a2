"""Row permutation with repetition, and its transpose.

`permute` copies rows (one row may go to several places); `unpermute` sums them back. Each is the other's gradient, so both directions of
both passes cost one gather or one segmented sum.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


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
    """The `RowMap` of an int64 index with values in [0, num_rows). No host synchronisation."""
    order_M = torch.argsort(index_M, stable=True)
    starts = torch.arange(num_rows + 1, device=index_M.device)
    return RowMap(index_M, order_M, torch.searchsorted(index_M[order_M], starts))


def permute(x_ND: Tensor, rows: RowMap) -> Tensor:
    """`x_ND[rows.index_M]`: [num_rows, D] -> [M, D], any float dtype. The gradient of a source row is the sum of its copies' gradients."""
    return _Permute.apply(x_ND, rows)


def unpermute(x_MD: Tensor, rows: RowMap) -> Tensor:
    """Sum of each source row's copies: [M, D] -> [num_rows, D]; zero where a source row has none.

    Sums in fp32 in ascending order of m, so the result does not depend on the number of threads.
    """
    return _Unpermute.apply(x_MD, rows)


def sum_rows(x_MD: Tensor, rows: RowMap) -> Tensor:
    """`unpermute` without autograd."""
    # embedding_bag is PyTorch's segmented gather-sum: one pass over the rows, on CPU and CUDA
    return torch.nn.functional.embedding_bag(rows.order_M, x_MD, rows.offsets, mode="sum", include_last_offset=True)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, rows):
        assert x_ND.dim() == 2 and x_ND.shape[0] == rows.num_rows, (x_ND.shape, rows.num_rows)
        ctx.rows = rows
        return x_ND.index_select(0, rows.index_M)

    @staticmethod
    def backward(ctx, grad_MD):
        return sum_rows(grad_MD.contiguous(), ctx.rows), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_MD, rows):
        assert x_MD.dim() == 2 and x_MD.shape[0] == rows.index_M.numel(), (x_MD.shape, rows.index_M.shape)
        ctx.rows = rows
        return sum_rows(x_MD.contiguous(), rows)

    @staticmethod
    def backward(ctx, grad_ND):
        return grad_ND.index_select(0, ctx.rows.index_M), None
