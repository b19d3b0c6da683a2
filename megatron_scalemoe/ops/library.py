"""The exchange of rows as torch ops, `torch.ops.scalemoe.*`: shapes for tracing, and gradients.

A transport (`ops.transports`), named by its number in the registry, does the work. dispatch and combine are each other's transpose, so the
four ops are two pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_scalemoe.ops.autograd import on_plain_cpu, refuse_second_derivative
from megatron_scalemoe.ops.transports.registry import registered


def gather_counts(transport: int, counts_Q: Tensor) -> Tensor:
    """Every rank's counts, [Q] -> [G, Q]."""
    return torch.ops.scalemoe.gather_counts(transport, counts_Q)


def dispatch(
    transport: int, x_TD: Tensor, experts_TK: Tensor, probs_TK: Tensor, num_local: int, alignment: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens to their experts' ranks: (rows [R, D], row_probs [R], tokens_per_expert int64 [num_local], map); see `Transport.dispatch`.

    Differentiable in x and probs.
    """
    return _Dispatch.apply(transport, x_TD, experts_TK, probs_TK, num_local, alignment)


def combine(transport: int, rows_RD: Tensor, map: Tensor, experts_TK: Tensor, num_local: int) -> Tensor:
    """Rows [R, D] back to their tokens and summed, [T, D]; see `Transport.combine`. Differentiable in rows."""
    return _Combine.apply(transport, rows_RD, map, experts_TK, num_local)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transport, x, experts, probs, num_local, alignment):
        ctx.transport, ctx.num_local = transport, num_local
        rows, row_probs, tokens_per_expert, map = _call("dispatch", x, transport, x, experts, probs, num_local, alignment)
        ctx.mark_non_differentiable(tokens_per_expert, map)
        ctx.save_for_backward(map, experts)
        return rows, row_probs, tokens_per_expert, map

    @staticmethod
    def backward(ctx, grad_rows, grad_row_probs, *_):
        refuse_second_derivative()
        grads = grad_rows.contiguous(), grad_row_probs.contiguous()
        grad_x, grad_probs = _call("dispatch_backward", grad_rows, ctx.transport, *grads, *ctx.saved_tensors, ctx.num_local)
        return None, grad_x, None, grad_probs, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, transport, rows, map, experts, num_local):
        ctx.transport, ctx.num_local, ctx.num_rows = transport, num_local, rows.shape[0]
        ctx.save_for_backward(map, experts)
        return _call("combine", rows, transport, rows, map, experts, num_local)

    @staticmethod
    def backward(ctx, grad_y):
        refuse_second_derivative()
        grad_y = grad_y.contiguous()
        grad_rows = _call("combine_backward", grad_y, ctx.transport, grad_y, *ctx.saved_tensors, ctx.num_local, ctx.num_rows)
        return None, grad_rows, None, None, None


def _call(name: str, x: Tensor, transport: int, *args):
    """The transport's method; for tensors that are traced, or not on the CPU, the op, which takes 5 us more, 80 with cold caches."""
    if on_plain_cpu(x):
        return getattr(registered(transport), name)(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.scalemoe, name)(transport, *args)


def _fake_dispatch(transport, x, experts, probs, num_local, alignment):
    context = torch.library.get_ctx()
    num_rows, map_items = context.new_dynamic_size(), context.new_dynamic_size()
    tokens_per_expert = experts.new_empty(num_local, dtype=torch.int64)
    return x.new_empty(num_rows, x.shape[1]), probs.new_empty(num_rows), tokens_per_expert, experts.new_empty(map_items)


# Not `torch.library.custom_op`: with cold caches its layers of Python cost a quarter of a millisecond more for each call.
_library = torch.library.Library("scalemoe", "FRAGMENT")


def _define(name: str, arguments: str, results: str, fake: Callable, autograd: Callable | None = None) -> None:
    """Defines `torch.ops.scalemoe.<name>`: the transport's method, its shapes for tracing, and its differentiable form, if any."""

    def by_transport(transport, *args):
        return getattr(registered(transport), name)(*args)

    _library.define(f"{name}(int transport, {arguments}) -> {results}")
    _library.impl(name, by_transport, "CPU")
    _library.impl(name, by_transport, "CUDA")
    torch.library.register_fake(f"scalemoe::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")


_define(
    "gather_counts",
    "Tensor counts",
    "Tensor",
    lambda transport, counts: counts.new_empty((registered(transport).group.size(), *counts.shape)),
)
_define(
    "dispatch",
    "Tensor x, Tensor experts, Tensor probs, int num_local, int alignment",
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_dispatch,
    _Dispatch.apply,
)
_define(
    "combine",
    "Tensor rows, Tensor map, Tensor experts, int num_local",
    "Tensor",
    lambda transport, rows, map, experts, num_local: rows.new_empty(experts.shape[0], rows.shape[1]),
    _Combine.apply,
)
_define(
    "dispatch_backward",
    "Tensor grad_rows, Tensor grad_row_probs, Tensor map, Tensor experts, int num_local",
    "(Tensor, Tensor)",
    lambda transport, grad_rows, grad_row_probs, map, experts, num_local: (
        grad_rows.new_empty(experts.shape[0], grad_rows.shape[1]),
        grad_row_probs.new_empty(experts.shape),
    ),
)
_define(
    "combine_backward",
    "Tensor grad_y, Tensor map, Tensor experts, int num_local, SymInt num_rows",
    "Tensor",
    lambda transport, grad_y, map, experts, num_local, num_rows: grad_y.new_empty(num_rows, grad_y.shape[1]),
)
