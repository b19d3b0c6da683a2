"""permute and unpermute, native and plain, against obvious twins, and their gradients."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_scalemoe.ops import native
from megatron_scalemoe.ops import permute as permute_module
from megatron_scalemoe.ops.permute import RowMap, permute, row_map, sum_rows, unpermute

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=["native", "plain"], autouse=True)
def implementation(request):
    """Every test by the native library, also below the size where it pays, and without it."""
    if request.param == "native" and native.cpu() is None:
        pytest.skip(native.why_not("cpu"))
    library = native.cpu() and permute_module.native_library()
    with mock.patch.multiple(permute_module, native_library=lambda: library if request.param == "native" else None, NATIVE_GATHER_BYTES=0):
        yield request.param


def sum_in_order(x: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Twin of `unpermute` to the last bit: one row after the other, in fp32 or fp64, rounded once."""
    sums = torch.zeros(num_rows, x.shape[1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    for m, n in enumerate(index.tolist()):
        sums[n] += x[m].to(sums.dtype)
    return sums.to(x.dtype)


@st.composite
def maps(draw):
    num_rows = draw(st.integers(1, 9))
    index = draw(st.lists(st.integers(0, num_rows - 1), max_size=20))
    # every other one of a longer tensor
    return num_rows, torch.tensor(index, dtype=torch.int64).repeat_interleave(2)[::2]


@given(maps(), st.sampled_from(DTYPES), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_twins(case, dtype, columns):
    num_rows, index = case
    rows = row_map(index, num_rows)
    x = torch.randn(num_rows, columns).to(dtype)
    assert torch.equal(permute(x, rows), x[index])
    y = (torch.randn(len(index), columns) * 10).to(dtype)
    assert torch.equal(unpermute(y, rows), sum_in_order(y, index, num_rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_wide_rows_have_the_same_bits_however_they_are_made(dtype):
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 30, (150,), generator=generator)
    x = (torch.randn(150, 1033, generator=generator) * 10).to(dtype)
    assert torch.equal(unpermute(x, row_map(index, 30)), sum_in_order(x, index, 30))


def test_large_rows_in_several_threads():
    """Enough bytes for several threads, recycled memory and stores past the caches."""
    index = torch.randint(0, 3000, (9000,), generator=torch.Generator().manual_seed(0))
    rows, x = row_map(index, 3000), torch.arange(3000 * 2048, dtype=torch.float32).view(3000, 2048) % 1021
    copies = permute(x, rows)
    assert torch.equal(copies, x[index])
    assert torch.equal(unpermute(copies, rows), x * index.bincount(minlength=3000)[:, None])


def test_gradients():
    rows = row_map(torch.tensor([2, 0, 2, 0, 0]), 4)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: permute(t, rows), (x,))
    assert torch.autograd.gradcheck(lambda t: unpermute(t, rows), (y,))
    assert not sum_rows(y, rows).requires_grad
    with pytest.raises(AssertionError, match="not differentiable"):
        torch.autograd.grad(permute(x, rows).sum(), x, create_graph=True)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)
def test_what_is_traced_is_plain_torch(implementation):
    def there_and_back(x, index):
        rows = row_map(index, 5)
        return unpermute(permute(x, rows), rows)

    example = torch.randn(5, 4), torch.tensor([0, 3, 3, 1, 4, 0])
    traced = make_fx(there_and_back, tracing_mode="fake")(*example)
    assert torch.equal(traced(*example), there_and_back(*example))


def test_strided_rows():
    wide = torch.randn(6, 10)
    rows = row_map(torch.tensor([5, 0, 3]), 6)
    assert torch.equal(permute(wide[:, :4], rows), wide[[5, 0, 3], :4])
    assert torch.equal(permute(wide.T[:6], rows), wide.T[[5, 0, 3]])
    assert torch.equal(unpermute(wide[:3, :4], rows)[5], wide[0, :4])
    assert torch.equal(unpermute(wide[0, :4].expand(3, 4), rows)[5], wide[0, :4])


@pytest.mark.parametrize("index", [-1, 2])
def test_rows_that_do_not_exist_are_refused(index):
    with pytest.raises(IndexError):
        row_map(torch.tensor([0, index]), 2)


@pytest.mark.parametrize(
    "broken", [{"index_M": [0, 2]}, {"order_M": [0, 2]}, {"order_M": [0, -1]}, {"offsets": [0, 3, 2]}, {"offsets": [-1, 1, 2]}]
)
@pytest.mark.parametrize("implementation", ["native"], indirect=True)  # torch checks its own
def test_the_native_library_reads_nothing_outside(implementation, broken):
    rows = RowMap(
        **{name: torch.tensor(values) for name, values in ({"index_M": [0, 1], "order_M": [0, 1], "offsets": [0, 1, 2]} | broken).items()}
    )
    with pytest.raises(IndexError):
        (permute if "index_M" in broken else unpermute)(torch.zeros(2, 4), rows)
