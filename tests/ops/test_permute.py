"""permute and unpermute against their plain-torch twins, and their gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.ops import reference
from megatron_scalemoe.ops.permute import permute, row_map, unpermute


@st.composite
def maps(draw):
    num_rows = draw(st.integers(1, 9))
    index = draw(st.lists(st.integers(0, num_rows - 1), max_size=20))
    return num_rows, torch.tensor(index, dtype=torch.int64)


@given(maps(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_twins(case, dtype):
    num_rows, index = case
    rows = row_map(index, num_rows)
    x = torch.randn(num_rows, 5).to(dtype)
    assert torch.equal(permute(x, rows), reference.permute(x, index))
    y = torch.randn(len(index), 5).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(unpermute(y, rows), reference.unpermute(y, index, num_rows), rtol=tolerance, atol=tolerance)


@given(maps())
@settings(max_examples=15, deadline=None)
def test_gradients(case):
    num_rows, index = case
    rows = row_map(index, num_rows)
    x = torch.randn(num_rows, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(index), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, rows), (x,))
    if len(index):
        assert torch.autograd.gradcheck(lambda t: unpermute(t, rows), (y,))


def test_order_is_ascending_within_a_source_row():
    rows = row_map(torch.tensor([2, 0, 2, 0, 0]), 4)
    assert rows.num_rows == 4
    assert rows.order_M.tolist() == [1, 3, 4, 0, 2]
    assert rows.offsets.tolist() == [0, 3, 3, 5, 5]


def test_bf16_sums_are_rounded_once():
    many = torch.full((1001, 8), 1.0, dtype=torch.bfloat16)  # adding 1 to 256 in bf16 changes nothing
    total = unpermute(many, row_map(torch.zeros(1001, dtype=torch.int64), 1))
    assert total[0, 0].item() == torch.tensor(1001.0, dtype=torch.bfloat16).item()


def test_strided_rows():
    wide = torch.randn(6, 10)
    rows = row_map(torch.tensor([5, 0, 3]), 6)
    assert torch.equal(permute(wide[:, :4], rows), wide[[5, 0, 3], :4])
    assert torch.equal(unpermute(wide[:3, :4], rows)[5], wide[0, :4])


def test_wrong_shapes_are_refused():
    rows = row_map(torch.tensor([0, 1]), 2)
    with pytest.raises(AssertionError):
        permute(torch.zeros(3, 4), rows)
    with pytest.raises(AssertionError):
        unpermute(torch.zeros(3, 4), rows)
