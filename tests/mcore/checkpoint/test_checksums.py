"""A tensor's checksum is the sum of its parts', however ranks cut it."""

import pytest

pytest.importorskip("megatron.core")
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_scalemoe.mcore.checkpoint.checksums import _checksum


def checksum(part: torch.Tensor, *offsets: tuple[int, int, int]) -> int:
    """offsets: (axis, index of the part, number of parts), as Megatron has them."""
    return int(_checksum(ShardedTensor.from_rank_offsets("weight", part, *offsets), 0, part.reshape(-1), 0))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_parts_along_any_axis(axis):
    whole = torch.randn(4, 6, 8)
    parts = [part.contiguous() for part in whole.chunk(2, axis)]
    total = sum(checksum(part, (axis, index, 2)) for index, part in enumerate(parts))
    assert (total - checksum(whole)) % 2**64 == 0
    assert checksum(parts[0], (axis, 0, 2)) != checksum(parts[0], (axis, 1, 2))


def test_ranges_of_the_flat_tensor():
    whole = torch.randn(4, 6)
    piece = ShardedTensor.from_rank_offsets("weight", whole)
    ranges = [_checksum(piece, 0, whole.reshape(-1)[start:end], start) for start, end in ((0, 7), (7, 24))]
    assert (int(sum(ranges)) - checksum(whole)) % 2**64 == 0
