"""Packing tensors side by side."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.ops.payload import ROW_ALIGN_BYTES, new_payload, payload_layout, unpack

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int16, torch.uint8]


@given(st.integers(0, 5), st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DTYPES)), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_parts_come_back_bitwise(num_rows, parts):
    layout = payload_layout(*parts)
    payload, columns = new_payload(num_rows, layout, torch.device("cpu"))
    values = [(torch.randn(num_rows, width) * 50).to(dtype) for width, dtype in parts]
    for column, value in zip(columns, values, strict=True):
        column.copy_(value)
    copied = payload.clone()
    for column, value in zip(unpack(copied, layout), values, strict=True):
        assert column.dtype == value.dtype
        assert torch.equal(column, value)
    assert layout.row_bytes % ROW_ALIGN_BYTES == 0
