"""Registers our functions as torch ops, `torch.ops.scalemoe.*`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Not `torch.library.custom_op`: with cold caches its layers of Python cost a quarter of a millisecond more for each call.
_library = torch.library.Library("scalemoe", "FRAGMENT")


def define_op(schema: str, *, cpu: Callable, cuda: Callable, fake: Callable, autograd: Callable | None = None) -> None:
    """Defines `torch.ops.scalemoe.<name>`: what computes it on each device, its shapes for tracing, and its differentiable form, if any."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"scalemoe::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, autograd, "Autograd")


def on_plain_cpu(x: Tensor) -> bool:
    """Whether the CPU's function may be called without torch's dispatcher, which takes 5 us to come back to Python, 80 with cold caches."""
    return type(x) is Tensor and x.is_cpu and torch._C._len_torch_dispatch_stack() == 0


def refuse_second_derivative() -> None:
    """For the backward of ops without one. Not `once_differentiable`, which takes longer than a small gather."""
    assert not torch.is_grad_enabled(), "gradients of permutation, routing and exchange are not differentiable"
