"""What one dispatch carried, from what the dispatcher parked for the way back: numbers that are on the host anyway."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from megatron_scalemoe.dispatch.padded import PaddedMetadata
from megatron_scalemoe.dispatch.ragged import RaggedMetadata
from megatron_scalemoe.ops.permute import RowMap


@dataclasses.dataclass
class TrafficCounts:
    """Of one layer on this rank, in training so far.

    stayed, left: rows that it sent to itself, and to other ranks. selections: (token, expert) pairs that its router should make, tokens x
    top-k. kept: rows of such pairs that were not dropped, on the rank that computes them, or with the padded baseline on the one that
    sends them. A dispatcher that is not known here counts as sending nothing.
    """

    stayed: int = 0
    left: int = 0
    selections: int = 0
    kept: int = 0

    def add(self, metadata: Any, group: torch.distributed.ProcessGroup, selections: int, rows: int) -> None:
        """Add one dispatch over `group` that gave this rank `rows` rows to compute."""
        stayed, left = _rows_sent(metadata, group, rows)
        self.stayed += stayed
        self.left += left
        self.selections += selections
        self.kept += metadata.slot_N.numel() if isinstance(metadata, PaddedMetadata) else rows


@functools.singledispatch
def _rows_sent(metadata: Any, group: torch.distributed.ProcessGroup, rows: int) -> tuple[int, int]:
    """Rows that this rank sent to itself and to the other ranks of the group, in a dispatch that gave it `rows` to compute."""
    return 0, 0


@_rows_sent.register
def _(metadata: RaggedMetadata, group: torch.distributed.ProcessGroup, rows: int) -> tuple[int, int]:
    stayed = metadata.splits.input[group.rank()]
    return stayed, sum(metadata.splits.input) - stayed


@_rows_sent.register
def _(metadata: PaddedMetadata, group: torch.distributed.ProcessGroup, rows: int) -> tuple[int, int]:
    per_rank = rows // group.size()
    return per_rank, rows - per_rank


@_rows_sent.register
def _(metadata: RowMap, group: torch.distributed.ProcessGroup, rows: int) -> tuple[int, int]:
    return rows, 0
