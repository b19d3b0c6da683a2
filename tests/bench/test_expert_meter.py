"""The expert meter: rows, times of forward and backward on a clock of the test's own."""

import time
import types

import pytest
import torch

from megatron_scalemoe.bench.expert_meter import ExpertMeter


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so; CPU time passes half as fast."""
    now = types.SimpleNamespace(s=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.s)
    monkeypatch.setattr(time, "process_time", lambda: now.s / 2)
    return now


class SlowExperts(torch.nn.Module):
    """2 x, weighted; takes 1 s for each row forward and 2 s backward, and waits 10 s for replicas."""

    def __init__(self, clock):
        super().__init__()
        self.replica_time_s, self._clock = 0.0, clock
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x_RD, tokens_per_expert, probs_R):
        self.replica_time_s += 10
        self._clock.s += 10 + len(x_RD)
        y_RD = self.weight * x_RD * probs_R[:, None]
        y_RD.register_hook(self._backward)
        return y_RD, None

    def _backward(self, grad_RD):
        self._clock.s += 2 * len(grad_RD)


def layer_of(clock):
    return types.SimpleNamespace(experts=SlowExperts(clock))


def test_each_call_has_its_rows_and_both_times_without_waiting(clock):
    layers = [layer_of(clock), layer_of(clock)]
    meter = ExpertMeter(layers)
    x_RD, counts_L = torch.ones(3, 4, requires_grad=True), torch.tensor([3])
    y_RD, bias = layers[0].experts(x_RD, counts_L, torch.full((3,), 0.5))
    assert bias is None
    clock.s += 100  # not the experts'
    z_RD, _ = layers[1].experts(y_RD[:2] * 1, counts_L, torch.ones(2))
    (z_RD * 3).sum().backward()
    calls = torch.tensor(meter.take())
    assert calls[:, :2].tolist() == [[3, 3 + 6], [2, 2 + 4]]
    # the process slept or computed in those 10 s; they are its own
    assert calls[:, 2].tolist() == [(13 + 6) / 2, (12 + 4) / 2]
    assert meter.take() == []


def test_the_result_and_gradients_are_those_of_the_experts(clock):
    measured, plain = layer_of(clock), SlowExperts(clock)
    ExpertMeter([measured])
    gradients = []
    for experts in (measured.experts, plain):
        x_RD, probs_R = torch.arange(6.0).view(3, 2).requires_grad_(), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
        y_RD, _ = experts(x_RD, torch.tensor([3]), probs_R)
        y_RD.square().sum().backward()
        gradients.append([y_RD.detach(), x_RD.grad, probs_R.grad, experts.weight.grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
