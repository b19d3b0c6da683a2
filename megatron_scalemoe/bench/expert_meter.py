"""Times the experts of a model, call by call, forward and backward, whichever module computes them."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

# What is measured of each call.
ROWS, WALL_S, CPU_S = range(3)


class ExpertMeter:
    """Measures the calls of MoE layers' `experts` modules, in the order of the forward; each has one backward.

    Rows, seconds on the host's clock and seconds of this process's CPU time (what the wall time would be with a core for every rank). On
    CUDA the host waits for the device at each end. Waiting for replicas does not count; their gradients' summation does.
    """

    def __init__(self, layers: list[torch.nn.Module]):
        self._calls: list[list[float]] = []
        self._began: tuple[float, float] = (0.0, 0.0)
        for layer in layers:
            layer.experts.forward = functools.partial(self._forward, layer.experts, layer.experts.forward)

    def take(self) -> list[list[float]]:
        """[calls][ROWS, WALL_S, CPU_S] since the last time. Between optimizer steps."""
        calls, self._calls = self._calls, []
        return calls

    def begin(self) -> None:
        """Now."""
        _synchronize()
        self._began = time.perf_counter(), time.process_time()

    def end(self, call: int, waited_s: float = 0.0) -> None:
        """Add the time since `begin`, less `waited_s`, to this call."""
        _synchronize()
        self._calls[call][WALL_S] += time.perf_counter() - self._began[0] - waited_s
        self._calls[call][CPU_S] += time.process_time() - self._began[1]

    def _forward(self, experts: torch.nn.Module, forward, x_RD: Tensor, tokens_per_expert: Tensor, probs_R: Tensor):
        call = len(self._calls)
        self._calls.append([float(x_RD.shape[0]), 0.0, 0.0])
        x_RD, probs_R = _Inputs.apply(x_RD, probs_R, self, call)
        waited_s = getattr(experts, "replica_time_s", 0.0)
        self.begin()
        y_RD, bias = forward(x_RD, tokens_per_expert, probs_R)
        self.end(call, getattr(experts, "replica_time_s", 0.0) - waited_s)
        return _Output.apply(y_RD, self), bias


class _Inputs(torch.autograd.Function):
    """The identity; its backward is after that of the experts."""

    @staticmethod
    def forward(ctx, x_RD: Tensor, probs_R: Tensor, meter: ExpertMeter, call: int):
        ctx.meter, ctx.call = meter, call
        return x_RD.view_as(x_RD), probs_R.view_as(probs_R)

    @staticmethod
    def backward(ctx, grad_x_RD: Tensor, grad_probs_R: Tensor):
        ctx.meter.end(ctx.call)
        return grad_x_RD, grad_probs_R, None, None


class _Output(torch.autograd.Function):
    """The identity; its backward is before that of the experts."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, meter: ExpertMeter):
        ctx.meter = meter
        return y_RD.view_as(y_RD)

    @staticmethod
    def backward(ctx, grad_y_RD: Tensor):
        ctx.meter.begin()
        return grad_y_RD, None


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
