"""route, native and plain: lists of experts, their probabilities, and the gradient."""

from unittest import mock

import pytest
import torch

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops import permute as permute_module
from megatron_scalemoe.ops import route as route_module
from megatron_scalemoe.ops.route import route


@pytest.fixture(params=["native", "plain"], autouse=True)
def implementation(request):
    if request.param == "native" and native.cpu() is None:
        pytest.skip(native.why_not("cpu"))
    if request.param == "plain":
        with mock.patch.object(permute_module, "native_library", return_value=None):
            yield
    else:
        yield


def routing(tokens: int, columns: int, most: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A bool map with 0 to `most` columns per token, and probabilities everywhere."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, columns, generator=generator).argsort(1)[:, :most]
    kept = torch.rand(tokens, most, generator=generator) > 0.2
    routing_map = torch.zeros(tokens, columns, dtype=torch.bool).scatter(1, chosen, kept)
    return routing_map, torch.rand(tokens, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tokens", "columns", "most"), [(77, 256, 8), (30, 13, 13), (5, 9, 1), (0, 4, 2), (6, 3, 5)])
def test_lists_of_experts(tokens, columns, most, dtype):
    routing_map, probs = routing(tokens, columns, most, dtype)
    experts, chosen = route(routing_map, probs, most)
    assert (experts.dtype, chosen.dtype, experts.shape, chosen.shape) == (torch.int32, dtype, (tokens, most), (tokens, most))
    for t in range(tokens):
        wanted = routing_map[t].nonzero()[:, 0].tolist()
        nothing = most - len(wanted)
        assert experts[t].tolist() == wanted + [-1] * nothing
        assert chosen[t].tolist() == probs[t, wanted].tolist() + [0] * nothing


def test_strided_inputs():
    routing_map, probs = routing(40, 16, 3)
    experts, chosen = route(routing_map.T.contiguous().T, probs.repeat(1, 2)[:, :16], 3)
    expected_experts, expected = route(routing_map, probs, 3)
    assert torch.equal(experts, expected_experts)
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_goes_to_the_chosen_columns(dtype):
    routing_map, probs = routing(50, 16, 4, dtype)
    probs.requires_grad_()
    experts, chosen = route(routing_map, probs, 4)
    assert not experts.requires_grad
    grad = torch.rand(50, 4).to(dtype)
    chosen.backward(grad)
    rank_of_column = (routing_map.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(probs.grad, torch.where(routing_map, grad.gather(1, rank_of_column), 0))


def test_an_expert_is_never_dropped_silently():
    routing_map = torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ScaleMoEError, match="a token with 4"):
        route(routing_map, torch.rand(3, 4), 3)


@pytest.mark.parametrize("implementation", ["native"], indirect=True)  # torch checks its own
def test_the_native_library_writes_no_column_that_does_not_exist(implementation):
    with pytest.raises(AssertionError):
        route_module._native_unroute(torch.rand(1, 2), torch.tensor([[0, 7]], dtype=torch.int32), 3)
