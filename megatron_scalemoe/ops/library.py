"""The exchange of rows as torch ops, `torch.ops.scalemoe.*`: shapes for tracing, and gradients.

A transport (`ops.transport`), named by its number in the registry, does the work.
dispatch and combine are each other's transpose, so the four ops are two pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_scalemoe.ops.transport import registered


@torch.library.custom_op("scalemoe::gather_counts", mutates_args=())
def gather_counts(transport: int, counts: Tensor) -> Tensor:
    """Every rank's counts, [Q] -> [G, Q]."""
    return registered(transport).gather_counts(counts)


@gather_counts.register_fake
def _(transport, counts):
    return counts.new_empty((registered(transport).group.size(), *counts.shape))


@torch.library.custom_op("scalemoe::dispatch", mutates_args=())
def dispatch(
    transport: int, x: Tensor, experts: Tensor, probs: Tensor, num_local: int, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens to their experts' ranks: (rows [R, D], row_probs [R], tokens_per_expert int64 [num_local], map); see `Transport.dispatch`.

    Differentiable in x [T, D] and probs [T, K].
    """
    return registered(transport).dispatch(x, experts, probs, num_local, alignment)


@dispatch.register_fake
def _(transport, x, experts, probs, num_local, alignment=1):
    context = torch.library.get_ctx()
    num_rows = context.new_dynamic_size()
    counts = torch.empty(num_local, dtype=torch.int64, device="cpu" if x.device.type == "cpu" else x.device)
    map_size = context.new_dynamic_size()
    return x.new_empty(num_rows, x.shape[1]), probs.new_empty(num_rows), counts, experts.new_empty(map_size)


@torch.library.custom_op("scalemoe::combine", mutates_args=())
def combine(transport: int, rows: Tensor, map: Tensor, experts: Tensor, num_local: int) -> Tensor:
    """Rows [R, D] back to their tokens and summed, [T, D]; see `Transport.combine`. Differentiable in rows."""
    return registered(transport).combine(rows, map, experts, num_local)


@combine.register_fake
def _(transport, rows, map, experts, num_local):
    return rows.new_empty(experts.shape[0], rows.shape[1])


@torch.library.custom_op("scalemoe::dispatch_backward", mutates_args=())
def dispatch_backward(
    transport: int, grad_rows: Tensor, grad_row_probs: Tensor, map: Tensor, experts: Tensor, num_local: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `dispatch`'s x and probs."""
    return registered(transport).dispatch_backward(grad_rows, grad_row_probs, map, experts, num_local)


@dispatch_backward.register_fake
def _(transport, grad_rows, grad_row_probs, map, experts, num_local):
    return grad_rows.new_empty(experts.shape[0], grad_rows.shape[1]), grad_row_probs.new_empty(experts.shape)


@torch.library.custom_op("scalemoe::combine_backward", mutates_args=())
def combine_backward(transport: int, grad_y: Tensor, map: Tensor, experts: Tensor, num_local: int, num_rows: int) -> Tensor:
    """Gradient of `combine`'s rows."""
    return registered(transport).combine_backward(grad_y, map, experts, num_local, num_rows)


@combine_backward.register_fake
def _(transport, grad_y, map, experts, num_local, num_rows):
    return grad_y.new_empty(num_rows, grad_y.shape[1])


def _save_dispatch(ctx, inputs, output):
    ctx.transport, _, experts, _, ctx.num_local, _ = inputs
    _, _, tokens_per_expert, map = output
    ctx.mark_non_differentiable(tokens_per_expert, map)
    ctx.save_for_backward(map, experts)


def _grad_dispatch(ctx, grad_rows, grad_row_probs, *_):
    map, experts = ctx.saved_tensors
    grad_x, grad_probs = dispatch_backward(ctx.transport, grad_rows.contiguous(), grad_row_probs.contiguous(), map, experts, ctx.num_local)
    return None, grad_x, None, grad_probs, None, None


def _save_combine(ctx, inputs, output):
    ctx.transport, rows, map, experts, ctx.num_local = inputs
    ctx.num_rows = rows.shape[0]
    ctx.save_for_backward(map, experts)


def _grad_combine(ctx, grad_y):
    map, experts = ctx.saved_tensors
    grad_rows = combine_backward(ctx.transport, grad_y.contiguous(), map, experts, ctx.num_local, ctx.num_rows)
    return None, grad_rows, None, None, None


dispatch.register_autograd(_grad_dispatch, setup_context=_save_dispatch)
combine.register_autograd(_grad_combine, setup_context=_save_combine)
