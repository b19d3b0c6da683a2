"""Several tensors with the same number of rows as the columns of one byte tensor, so that they travel in one collective."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

ROW_ALIGN_BYTES = 16  # GPU kernels move rows in 16-byte words


@dataclasses.dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Byte offset, columns and dtype of each part of a payload row."""

    parts: tuple[tuple[int, int, torch.dtype], ...]
    row_bytes: int


def payload_layout(*parts: tuple[int, torch.dtype]) -> PayloadLayout:
    """Layout of a row whose parts have the given (columns, dtype), in that order, each aligned to its dtype."""
    placed, end = [], 0
    for columns, dtype in parts:
        start = _round_up(end, dtype.itemsize)
        placed.append((start, columns, dtype))
        end = start + columns * dtype.itemsize
    return PayloadLayout(tuple(placed), _round_up(end, ROW_ALIGN_BYTES))


def new_payload(num_rows: int, layout: PayloadLayout, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """An uninitialised uint8 [num_rows, row_bytes] tensor and views of its parts to write into."""
    payload = torch.empty((num_rows, layout.row_bytes), dtype=torch.uint8, device=device)
    return payload, unpack(payload, layout)


def unpack(payload: Tensor, layout: PayloadLayout) -> tuple[Tensor, ...]:
    """The parts of a payload, [N, columns] each, as views into it."""
    return tuple(payload[:, start : start + columns * dtype.itemsize].view(dtype) for start, columns, dtype in layout.parts)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
