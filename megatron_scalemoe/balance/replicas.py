"""Replicas of one layer's experts: transient copies of parameters that stay Megatron's, and exact.

The home expert is an ordinary parameter: the optimizer, DDP and the checkpoint know nothing of its replicas. In each optimizer step the
homes send their parameters once to the ranks that hold replicas; the gradients that the replicas collect over all micro-batches return
once and are added to the homes' main gradients, before DDP scales and reduces these. So the sum is the one that a single copy would have
computed, up to the order of summation. In the paper (Choi et al., PACT'25) all copies are parameters whose gradients are all-reduced.

Shapes: L home experts, R replicas on this rank, N copies of this rank's homes on other ranks; F1, F2, D as in `experts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.ops.permute import row_map, sum_rows
from megatron_scalemoe.ops.ragged import Splits, naming_failure
from megatron_scalemoe.plan.placement_plan import EMPTY


class LayerReplicas:
    """Owns the copies that this rank holds of other ranks' experts under one layer's slots (int [P]), and their gradients.

    The copies are valid until `renew`, which must come when the optimizer has changed the parameters. All ranks of `group` call each method
    together. `count_time` is told how many seconds this rank waited for parameters or gradients, on the host's clock.
    """

    def __init__(
        self,
        fc1: torch.nn.Parameter,
        fc2: torch.nn.Parameter,
        slots_P: np.ndarray,
        group: dist.ProcessGroup,
        count_time: Callable[[float], None],
    ):
        self.parameters, self.group, self._count_time = (fc1, fc2), group, count_time
        ranks, me, num_homes = group.size(), group.rank(), fc1.shape[0]
        slots_GS = slots_P.reshape(ranks, -1)
        home_rank, home_index = _homes(slots_GS[:, :num_homes])
        copies = [row[row != EMPTY] for row in slots_GS[:, num_homes:]]
        self.replica_slots = np.flatnonzero(slots_GS[me, num_homes:] != EMPTY)
        sent = [home_index[experts[home_rank[experts] == me]] for experts in copies]
        sources = home_rank[copies[me]]
        self._splits = Splits(tuple(len(part) for part in sent), tuple(np.bincount(sources, minlength=ranks).tolist()))
        as_index = lambda array: torch.from_numpy(array.astype(np.int64)).to(fc1.device)  # noqa: E731
        self._sent_N = as_index(np.concatenate(sent))
        # rows arrive by source rank, and from each in the order of the slots
        by_source = np.argsort(sources, kind="stable")
        self._arrives_R, self._slot_of_row_R = as_index(np.argsort(by_source)), as_index(by_source)
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._weights: tuple[Tensor, Tensor] | None = None
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._used = False

    def start(self) -> None:
        """Begin to send the parameters, unless the copies are valid or on their way."""
        if self._weights is None and self._pending is None:
            rows_ND = torch.cat([parameter.detach().flatten(1).index_select(0, self._sent_N) for parameter in self.parameters], 1)
            self._pending = self._exchange(rows_ND, self._splits, async_op=True)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The copies: fc1 [R, F1, D] and fc2 [R, D, F2], without gradient."""
        began = time.perf_counter()
        self.start()
        if self._weights is None:
            rows_RD, work = self._pending
            with naming_failure("replica exchange", self.group):
                work.wait()
            self._pending = None
            self._weights = self._unpacked(rows_RD, self._arrives_R)
        self._count_time(time.perf_counter() - began)
        return self._weights

    def with_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Homes' fc1 and fc2 and the copies' for use in a forward: the gradients of the copies are kept here."""
        if torch.is_grad_enabled():
            self._used = True
        return _Together.apply(*self.parameters, self)

    def add_gradients(self, *gradients: Tensor) -> None:
        """Add one micro-batch's gradients of the copies."""
        if self._gradients is None:
            kept = zip(gradients, self.parameters, strict=True)
            self._gradients = tuple(gradient.to(parameter.main_grad.dtype, copy=True) for gradient, parameter in kept)
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total += gradient

    def return_gradients(self) -> None:
        """Add what the replicas have collected to the homes' main gradients, once per pass over the step's micro-batches."""
        if not self._used:
            return
        began = time.perf_counter()
        grads = self._gradients or [p.main_grad.new_zeros(len(self.replica_slots), *p.shape[1:]) for p in self.parameters]
        rows_RD = torch.cat([gradient.flatten(1).index_select(0, self._slot_of_row_R) for gradient in grads], 1)
        returned_ND, _ = self._exchange(rows_RD, self._splits.reversed(), async_op=False)
        # a sum in a fixed order, whatever the device
        sums_LD = sum_rows(returned_ND, row_map(self._sent_N, self.parameters[0].shape[0]))
        for parameter, total in zip(self.parameters, self._split_columns(sums_LD), strict=True):
            parameter.main_grad.add_(total.view_as(parameter))
        self.drop_gradients()
        self._count_time(time.perf_counter() - began)

    def drop_gradients(self) -> None:
        """Forget the gradients collected so far, as when the main gradients, DDP's buffer, are set to 0. The copies stay valid."""
        self._gradients, self._used = None, False

    def renew(self) -> None:
        """The parameters have changed: send them anew before the next use."""
        if self._pending is not None:
            self._pending[1].wait()
        self._pending = self._weights = None
        self.drop_gradients()

    def _exchange(self, rows: Tensor, splits: Splits, *, async_op: bool) -> tuple[Tensor, dist.Work | None]:
        received = rows.new_empty(sum(splits.output), rows.shape[1])
        with naming_failure("replica exchange", self.group):
            work = dist.all_to_all_single(received, rows, list(splits.output), list(splits.input), group=self.group, async_op=async_op)
        return received, work

    def _split_columns(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([parameter[0].numel() for parameter in self.parameters], 1)

    def _unpacked(self, rows_RD: Tensor, order_R: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self._split_columns(rows_RD), self.parameters, strict=True)
        return tuple(part.index_select(0, order_R).view(-1, *parameter.shape[1:]) for part, parameter in parts)


class _Together(torch.autograd.Function):
    """Hands out homes and copies. Its backward comes after the gradients of both, so that the copies' are complete before DDP hears of the
    homes': with overlap_grad_reduce DDP then starts the reduction."""

    @staticmethod
    def forward(ctx, fc1, fc2, replicas):
        ctx.replicas = replicas
        return fc1.view_as(fc1), fc2.view_as(fc2), *(weight.view_as(weight) for weight in replicas.weights())

    @staticmethod
    def backward(ctx, grad_fc1, grad_fc2, grad_copy1, grad_copy2):
        ctx.replicas.add_gradients(grad_copy1, grad_copy2)
        return grad_fc1, grad_fc2, None


def _homes(homes_GL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int [E], int [E]: rank and index among the rank's homes of each expert."""
    order = np.argsort(homes_GL.reshape(-1))
    return np.divmod(order, homes_GL.shape[1])
