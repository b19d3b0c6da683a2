"""What one dispatch carried, from what the dispatcher parked for the way back. Nothing waits for the device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megatron_scalemoe.dispatch.fused import FusedMetadata
from megatron_scalemoe.dispatch.padded import PaddedMetadata
from megatron_scalemoe.dispatch.ragged import RaggedMetadata
from megatron_scalemoe.ops.permute import RowMap

Count = int | torch.Tensor


@dataclasses.dataclass
class TrafficCounts:
    """Of one layer on this rank, in training so far.

    stayed, left: rows that it sent to itself, and to other ranks. selections: (token, expert) pairs that its router should make, tokens x
    top-k. kept: rows of such pairs that were not dropped, on the rank that computes them, or with the padded baseline on the one that
    sends them. Numbers, or tensors of one number. A dispatcher that is not known here counts as sending nothing.
    """

    stayed: Count = 0
    left: Count = 0
    selections: int = 0
    kept: Count = 0

    def add(self, metadata: Any, group: torch.distributed.ProcessGroup, selections: int, rows: Count) -> None:
        """Add one dispatch over `group` that gave this rank `rows` rows to compute."""
        stayed, left = _rows_sent(metadata, group, rows)
        self.stayed = self.stayed + stayed
        self.left = self.left + left
        self.selections += selections
        self.kept = self.kept + (metadata.slot_N.numel() if isinstance(metadata, PaddedMetadata) else rows)


@functools.singledispatch
def _rows_sent(metadata: Any, group: torch.distributed.ProcessGroup, rows: Count) -> tuple[Count, Count]:
    """Rows that this rank sent to itself and to the other ranks of the group, in a dispatch that gave it `rows` to compute."""
    return 0, 0


@_rows_sent.register
def _(metadata: RaggedMetadata, group: torch.distributed.ProcessGroup, rows: Count) -> tuple[Count, Count]:
    stayed = metadata.splits.input[group.rank()]
    return stayed, sum(metadata.splits.input) - stayed


@_rows_sent.register
def _(metadata: FusedMetadata, group: torch.distributed.ProcessGroup, rows: Count) -> tuple[Count, Count]:
    rank_TK = metadata.experts_TK // metadata.num_local_experts
    # a row for each rank, though several of the token's experts may be there
    goes_TK = metadata.experts_TK >= 0
    goes_TK[:, 1:] &= rank_TK[:, 1:] != rank_TK[:, :-1]
    stayed = (goes_TK & (rank_TK == group.rank())).sum()
    return stayed, goes_TK.sum() - stayed


@_rows_sent.register
def _(metadata: PaddedMetadata, group: torch.distributed.ProcessGroup, rows: Count) -> tuple[Count, Count]:
    per_rank = rows // group.size()
    return per_rank, rows - per_rank


@_rows_sent.register
def _(metadata: RowMap, group: torch.distributed.ProcessGroup, rows: Count) -> tuple[Count, Count]:
    return rows, 0
