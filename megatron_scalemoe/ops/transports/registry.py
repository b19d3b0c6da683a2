"""What the ranks of a group exchange rows through, beside the collectives of torch.distributed: the protocol, and a registry of open ones.

The rows of one op make their whole way in it: x [T, D] in token order here, expert rows [R, D] in (expert, source rank, token) order there.
`ops.library` makes differentiable torch ops of the methods.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """An open transport of a group of G ranks. All ranks call the same methods in the same order; none is differentiable.

    `experts` is int32 [T, K]: the columns (expert slots; rank g has num_local of them from g * num_local) that want each token, ascending,
    then -1. `map` is int32, made by `dispatch` and understood only by the transport that made it. A dead or hung rank raises
    `ScaleMoEError` with its number within the transport's timeout, and so does every later call.
    """

    name: str
    group: dist.ProcessGroup

    def gather_counts(self, counts_Q: Tensor) -> Tensor:
        """Every rank's counts: int [Q] -> the same dtype [G, Q]."""

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rows [R, D], row_probs [R], tokens_per_expert int64 [num_local], map.

        Each expert's rows are padded with zeros to a multiple of `alignment`, which its count includes.
        """

    def combine(self, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int) -> Tensor:
        """Sum of each token's rows, [T, D]; zero without any. On each rank in ascending order of experts, then over ranks in ascending
        order, both in fp32 (fp64 for fp64) and rounded to the rows' dtype."""

    def combine_backward(self, grad_y_TD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int, num_rows: int) -> Tensor:
        """The transpose of `combine`: each row gets its token's gradient, [num_rows, D]; padding gets zero."""

    def dispatch_backward(
        self, grad_rows_RD: Tensor, grad_row_probs_R: Tensor, map: Tensor, experts_TK: Tensor, num_local: int
    ) -> tuple[Tensor, Tensor]:
        """The transpose of `dispatch`: gradients [T, D], summed as by `combine`, and [T, K], zero where there is no expert."""

    def close(self) -> None:
        """Give back memory and handles. Not collective."""


_open: dict[int, Transport] = {}
_numbers = itertools.count()


def register(transport: Transport) -> int:
    """A number for the transport, as torch ops take no objects."""
    number = next(_numbers)
    _open[number] = transport
    return number


def unregister(number: int) -> None:
    """Forget the transport. It stays open."""
    del _open[number]


def registered(number: int) -> Transport:
    """The transport of this number."""
    return _open[number]
