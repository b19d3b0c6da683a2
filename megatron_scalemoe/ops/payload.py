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


def payload_layout(parts: list[tuple[int, torch.dtype]]) -> PayloadLayout:
    """Layout of a row whose parts have the given (columns, dtype), in that order, each aligned to its dtype."""
    placed, end = [], 0
    for columns, dtype in parts:
        start = _round_up(end, dtype.itemsize)
        placed.append((start, columns, dtype))
        end = start + columns * dtype.itemsize
    return PayloadLayout(tuple(placed), _round_up(end, ROW_ALIGN_BYTES))


def pack_rows(*parts: Tensor) -> tuple[Tensor, PayloadLayout]:
    """Copy tensors [N, columns] side by side into a uint8 [N, row_bytes] tensor. The padding bytes are not initialised."""
    layout = payload_layout([(part.shape[1], part.dtype) for part in parts])
    payload = parts[0].new_empty((parts[0].shape[0], layout.row_bytes), dtype=torch.uint8)
    for column, part in zip(unpack_rows(payload, layout), parts, strict=True):
        column.copy_(part)
    return payload, layout


def unpack_rows(payload: Tensor, layout: PayloadLayout) -> tuple[Tensor, ...]:
    """The parts of a payload, as views into it."""
    return tuple(payload[:, start : start + columns * dtype.itemsize].view(dtype) for start, columns, dtype in layout.parts)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
