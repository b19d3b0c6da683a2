"""The routing of a layer as short lists of experts, which is what travels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.define import define_op, on_plain_cpu, refuse_second_derivative
from megatron_scalemoe.ops.permute import native_library


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
        if on_plain_cpu(probs):
            experts, chosen = _cpu_route(routing_map, probs, max_experts)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                experts, chosen = torch.ops.scalemoe.route(routing_map, probs, max_experts)
        ctx.num_columns = routing_map.shape[1]
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(experts)
        return experts, chosen

    @staticmethod
    def backward(ctx, _, grad_chosen):
        refuse_second_derivative()
        (experts,) = ctx.saved_tensors
        unroute = _cpu_unroute if on_plain_cpu(grad_chosen) else torch.ops.scalemoe.unroute
        return None, unroute(grad_chosen, experts, ctx.num_columns), None


def plain_route(routing_map: Tensor, probs: Tensor, max_experts: int) -> tuple[Tensor, Tensor]:
    """`route` in plain torch, without the check."""
    num_columns = routing_map.shape[1]
    # absent columns carry the largest number, so they sort behind the others
    numbers = torch.arange(num_columns, dtype=torch.int32, device=routing_map.device)
    columns = torch.where(routing_map, numbers, num_columns).sort(1).values[:, :max_experts]
    columns = torch.nn.functional.pad(columns, (0, max_experts - columns.shape[1]), value=num_columns)
    chosen = torch.nn.functional.pad(probs, (0, 1)).gather(1, columns.long())
    return columns.masked_fill(columns == num_columns, -1), chosen


def plain_unroute(chosen: Tensor, experts: Tensor, num_columns: int) -> Tensor:
    """[T, K] values to their experts' columns, [T, num_columns], zero elsewhere; in plain torch."""
    spread = chosen.new_zeros(chosen.shape[0], num_columns + 1)
    return spread.scatter(1, experts.long().where(experts >= 0, num_columns), chosen)[:, :num_columns].contiguous()


def _cpu_route(routing_map: Tensor, probs: Tensor, max_experts: int) -> tuple[Tensor, Tensor]:
    library = native_library()
    if library is None:
        _check_most(int(routing_map.sum(1).max()) if routing_map.numel() else 0, max_experts)
        return plain_route(routing_map, probs, max_experts)
    routing_map, probs = routing_map.contiguous(), probs.contiguous()
    num_tokens, num_columns = probs.shape
    experts, chosen = torch.empty((num_tokens, max_experts), dtype=torch.int32), probs.new_empty(num_tokens, max_experts)
    most = ctypes.c_int64()
    code = library.scalemoe_route(
        routing_map.data_ptr(),
        probs.data_ptr(),
        probs.element_size(),
        num_tokens,
        num_columns,
        max_experts,
        experts.data_ptr(),
        chosen.data_ptr(),
        ctypes.byref(most),
        torch.get_num_threads(),
    )
    assert code == 0, f"route of {probs.dtype}"
    _check_most(most.value, max_experts)
    return experts, chosen


def _cpu_unroute(chosen: Tensor, experts: Tensor, num_columns: int) -> Tensor:
    library = native_library()
    if library is None:
        return plain_unroute(chosen, experts, num_columns)
    chosen, experts = chosen.contiguous(), experts.contiguous()
    num_tokens, max_experts = chosen.shape
    spread = chosen.new_empty(num_tokens, num_columns)
    sizes = chosen.element_size(), num_tokens, num_columns, max_experts
    code = library.scalemoe_unroute(chosen.data_ptr(), experts.data_ptr(), *sizes, spread.data_ptr(), torch.get_num_threads())
    assert code == 0, f"unroute of {chosen.dtype} to {num_columns} columns"
    return spread


def _check_most(most: int, max_experts: int) -> None:
    if most > max_experts:
        raise ScaleMoEError(
            f"at most {max_experts} experts per token were expected",
            found=f"a token with {most}",
            try_="a larger max_experts_per_token",
        )


define_op(
    "route(Tensor routing_map, Tensor probs, SymInt max_experts) -> (Tensor, Tensor)",
    cuda=plain_route,
    cpu=_cpu_route,
    fake=lambda routing_map, probs, max_experts: (
        probs.new_empty((probs.shape[0], max_experts), dtype=torch.int32),
        probs.new_empty(probs.shape[0], max_experts),
    ),
    autograd=_Route.apply,
)
define_op(
    "unroute(Tensor chosen, Tensor experts, SymInt num_columns) -> Tensor",
    cuda=plain_unroute,
    cpu=_cpu_unroute,
    fake=lambda chosen, experts, num_columns: chosen.new_empty(chosen.shape[0], num_columns),
)
