"""Ragged all-to-all over a process group: any number of rows to each rank, with gradients, and a packed form for rows with metadata."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.payload import PayloadLayout, new_payload, payload_layout, unpack
from megatron_scalemoe.ops.permute import RowMap, sum_rows


@dataclasses.dataclass(frozen=True, slots=True)
class Splits:
    """Rows to and from each rank of a group, in rank order."""

    input: tuple[int, ...]
    output: tuple[int, ...]

    def reversed(self) -> Splits:
        return Splits(self.output, self.input)


def ragged_all_to_all(x: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Send `input_splits[g]` leading rows of `x` to each rank g of the group and receive `output_splits[g]` from it, in rank order.

    x: [sum(input_splits), ...], any trailing shape and dtype the backend carries. Differentiable: the gradient makes the way back. Raises
    `ScaleMoEError` when the splits don't fit `x` or the group, and when a peer dies or hangs beyond the group's timeout.
    """
    splits = Splits(tuple(input_splits), tuple(output_splits))
    if len(splits.input) != group.size() or len(splits.output) != group.size() or sum(splits.input) != x.shape[0]:
        raise ScaleMoEError(
            f"ragged_all_to_all needs one input and one output split per rank ({group.size()}), input splits summing to {x.shape[0]} rows",
            found=f"input_splits={list(splits.input)}, output_splits={list(splits.output)}",
        )
    return _RaggedAllToAll.apply(x, splits, group)


def pack_rows(x_TD: Tensor, probs_NK: Tensor, experts_NK: Tensor, sent: RowMap) -> tuple[Tensor, PayloadLayout]:
    """Permute by `sent` straight into a payload: rows of x, beside them their probabilities (any float dtype) and experts (int16).

    No gradient: `send_rows` has it. The two are apart so that packing needs no splits, and overlaps with the exchange of counts.
    """
    parts = (probs_NK, experts_NK)
    layout = payload_layout((x_TD.shape[1], x_TD.dtype), *((part.shape[1], part.dtype) for part in parts))
    payload, (x_ND, *columns) = new_payload(sent.index_M.numel(), layout, x_TD.device)
    with torch.no_grad():
        torch.index_select(x_TD, 0, sent.index_M, out=x_ND)
        for column, part in zip(columns, parts, strict=True):
            column.copy_(part)
    return payload, layout


def send_rows(
    x_TD: Tensor, probs_NK: Tensor, packed: tuple[Tensor, PayloadLayout], sent: RowMap, splits: Splits, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged all-to-all of what `pack_rows` made from the same arguments; one collective forward, one backward.

    Returns the received (x [M, D], probs [M, K], experts [M, K]) as views into one payload; x and probs carry gradients, to `x_TD` and
    `probs_NK`.
    """
    return _SendRows.apply(x_TD, probs_NK, *packed, sent, splits, group)


@dataclasses.dataclass(frozen=True, slots=True)
class PendingCounts:
    """An all-to-all of counts under way; `wait` returns the received [G, C] tensor."""

    received_GC: Tensor
    work: dist.Work
    group: dist.ProcessGroup

    def wait(self) -> Tensor:
        with naming_failure("count exchange", self.group):
            self.work.wait()
        return self.received_GC


def start_count_exchange(counts_GC: Tensor, group: dist.ProcessGroup) -> PendingCounts:
    """Start sending row g of `counts_GC` (int64) to each rank g; row g of the result is what rank g sent here."""
    received_GC = torch.empty_like(counts_GC)
    with naming_failure("count exchange", group):
        work = dist.all_to_all_single(received_GC, counts_GC.contiguous(), group=group, async_op=True)
    return PendingCounts(received_GC, work, group)


@contextlib.contextmanager
def naming_failure(what: str, group: dist.ProcessGroup):
    """Turn a collective's loss of its peers into a `ScaleMoEError` that says which collective, rank and peers.

    What this rank itself did wrong (memory, shapes, dtypes) passes unchanged.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_communication_failure(error):
            raise
        ranks = dist.get_process_group_ranks(group)
        raise ScaleMoEError(
            f"{what} failed on rank {dist.get_rank()}: another rank of the group {ranks} died, hung or left the step",
            found=str(error).splitlines()[0],
            try_="look for the first error in the other ranks' logs; the job has to be restarted from its last checkpoint",
        ) from error


def is_communication_failure(error: BaseException) -> bool:
    """Whether a process group's backend lost a peer, or waited for one in vain."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def gather_objects(value: object, group: dist.ProcessGroup) -> list:
    """Every rank's value, in group order."""
    gathered: list = [None] * group.size()
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _all_to_all(x: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty((sum(splits.output), *x.shape[1:]))
    with naming_failure("ragged all-to-all", group):
        dist.all_to_all_single(out, x.contiguous(), list(splits.output), list(splits.input), group=group)
    return out


class _RaggedAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, splits, group):
        ctx.splits, ctx.group = splits, group
        return _all_to_all(x, splits, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad, ctx.splits.reversed(), ctx.group), None, None


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, probs_NK, payload, layout, sent, splits, group):
        x_MD, probs_MK, experts_MK = unpack(_all_to_all(payload, splits, group), layout)
        ctx.sent, ctx.splits, ctx.group = sent, splits, group
        ctx.mark_non_differentiable(experts_MK)
        return x_MD, probs_MK, experts_MK

    @staticmethod
    def backward(ctx, grad_x_MD, grad_probs_MK, _):
        layout = payload_layout((grad_x_MD.shape[1], grad_x_MD.dtype), (grad_probs_MK.shape[1], grad_probs_MK.dtype))
        payload, columns = new_payload(grad_x_MD.shape[0], layout, grad_x_MD.device)
        for column, values in zip(columns, (grad_x_MD, grad_probs_MK), strict=True):
            column.copy_(values)
        returned = _all_to_all(payload, ctx.splits.reversed(), ctx.group)
        _, grad_probs_NK = unpack(returned, layout)
        # Summing whole payload rows spares a copy; the columns behind x are meaningless as x.dtype and cut off.
        grad_TD = sum_rows(returned.view(grad_x_MD.dtype), ctx.sent)[:, : grad_x_MD.shape[1]]
        return grad_TD, grad_probs_NK, None, None, None, None, None
