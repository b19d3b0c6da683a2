"""The routing of a layer as short lists of experts, which is what travels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.autograd import on_plain_cpu, refuse_second_derivative
from megatron_scalemoe.ops.permute import native_for


def route(routing_map_TQ: Tensor, probs_TQ: Tensor, max_experts: int) -> tuple[Tensor, Tensor]:
    """The columns set in each row of a bool map, ascending, then -1: int32 [T, K], K = max_experts. Their probabilities, then 0: [T, K].

    Differentiable in the probabilities (any float dtype); those of columns that are not set get no gradient. No host synchronisation on
    CUDA, so there columns beyond the first K are dropped; on the CPU they raise `ScaleMoEError`.
    """
    assert routing_map_TQ.dtype == torch.bool and routing_map_TQ.shape == probs_TQ.shape, (routing_map_TQ.dtype, probs_TQ.shape)
    return _Route.apply(routing_map_TQ, probs_TQ, max_experts)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, routing_map, probs, max_experts):
        if native_for(probs) is not None:
            experts, chosen = _native_route(routing_map, probs, max_experts)
        else:
            if on_plain_cpu(probs) and routing_map.numel():
                _check_most(int(routing_map.sum(1).max()), max_experts)
            experts, chosen = _plain_route(routing_map, probs, max_experts)
        ctx.num_columns = routing_map.shape[1]
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(experts)
        return experts, chosen

    @staticmethod
    def backward(ctx, _, grad_chosen):
        refuse_second_derivative()
        (experts,) = ctx.saved_tensors
        unroute = _plain_unroute if native_for(grad_chosen) is None else _native_unroute
        return None, unroute(grad_chosen, experts, ctx.num_columns), None


def _plain_route(routing_map: Tensor, probs: Tensor, max_experts: int) -> tuple[Tensor, Tensor]:
    num_columns = routing_map.shape[1]
    # absent columns carry the largest number, so they sort behind the others
    numbers = torch.arange(num_columns, dtype=torch.int32, device=routing_map.device)
    columns = torch.where(routing_map, numbers, num_columns).sort(1).values[:, :max_experts]
    columns = torch.nn.functional.pad(columns, (0, max_experts - columns.shape[1]), value=num_columns)
    chosen = torch.nn.functional.pad(probs, (0, 1)).gather(1, columns.long())
    return columns.masked_fill(columns == num_columns, -1), chosen


def _plain_unroute(chosen: Tensor, experts: Tensor, num_columns: int) -> Tensor:
    """[T, K] values to their experts' columns, [T, num_columns], zero elsewhere."""
    spread = chosen.new_zeros(chosen.shape[0], num_columns + 1)
    return spread.scatter(1, experts.long().where(experts >= 0, num_columns), chosen)[:, :num_columns].contiguous()


def _native_route(routing_map: Tensor, probs: Tensor, max_experts: int) -> tuple[Tensor, Tensor]:
    routing_map, probs = routing_map.contiguous(), probs.contiguous()
    num_tokens, num_columns = probs.shape
    experts, chosen = torch.empty((num_tokens, max_experts), dtype=torch.int32), probs.new_empty(num_tokens, max_experts)
    most = ctypes.c_int64()
    sizes = probs.element_size(), num_tokens, num_columns, max_experts
    results = experts.data_ptr(), chosen.data_ptr(), ctypes.byref(most)
    code = native_for(probs).scalemoe_route(routing_map.data_ptr(), probs.data_ptr(), *sizes, *results, torch.get_num_threads())
    assert code == 0, f"route of {probs.dtype}"
    _check_most(most.value, max_experts)
    return experts, chosen


def _native_unroute(chosen: Tensor, experts: Tensor, num_columns: int) -> Tensor:
    chosen, experts = chosen.contiguous(), experts.contiguous()
    num_tokens, max_experts = chosen.shape
    spread = chosen.new_empty(num_tokens, num_columns)
    sizes = chosen.element_size(), num_tokens, num_columns, max_experts
    code = native_for(chosen).scalemoe_unroute(chosen.data_ptr(), experts.data_ptr(), *sizes, spread.data_ptr(), torch.get_num_threads())
    assert code == 0, f"unroute of {chosen.dtype} to {num_columns} columns"
    return spread


def _check_most(most: int, max_experts: int) -> None:
    if most > max_experts:
        raise ScaleMoEError(
            f"at most {max_experts} experts per token were expected",
            found=f"a token with {most}",
            try_="a larger max_experts_per_token",
        )
