"""What our autograd functions share."""

from __future__ import annotations

import torch
from torch import Tensor


def on_plain_cpu(x: Tensor) -> bool:
    """Whether a C function may read the tensor: it is on the CPU, not traced, and nobody watches the torch operations."""
    return type(x) is Tensor and x.is_cpu and torch._C._len_torch_dispatch_stack() == 0


def refuse_second_derivative() -> None:
    """For the backward of ops without one. Not `once_differentiable`, which takes longer than a small gather."""
    assert not torch.is_grad_enabled(), "gradients of permutation, routing and exchange are not differentiable"
