import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from megatron_scalemoe.balance import recorder
from megatron_scalemoe.balance.model import MoESizes
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace


@dataclasses.dataclass(frozen=True)
class Group:
    ranks: int
    own: int = 0

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.own


def test_a_recorded_step_is_the_mean_micro_batch_of_its_iterations(monkeypatch):
    """On rank 1 of one of two expert-parallel groups, of which the other counts the same."""
    monkeypatch.setattr(recorder.dist, "all_reduce", lambda counts, group: counts.mul_(2))
    router = SimpleNamespace(tokens_per_expert=torch.zeros(2, dtype=torch.int64))
    groups = SimpleNamespace(ep=Group(2, 1), stage=Group(4), expert_tp=Group(1))
    recording = recorder.RoutingRecorder([router], groups, MoESizes(2, 1, 8, 8, False, torch.float32, False))
    for iteration, micro_batches in ((1, 2), (2, 4), (3, 4)):  # a batch that grows
        router.tokens_per_expert += torch.tensor([2, 4]) * micro_batches
        recording.end_step(micro_batches)
        if iteration != 2:
            recording.mark(iteration)
    trace = recording.gather()
    assert trace.iterations == [1, 3]
    assert trace.counts[:, 0].tolist() == [[[0, 0], [2, 4]]] * 2
    assert recording.gather() is None


def test_a_trace_that_cannot_be_written_is_told_and_written_later(monkeypatch, tmp_path):
    def all_gather_object(parts, part, group):
        parts[0] = part

    monkeypatch.setattr(recorder.dist, "all_gather_object", all_gather_object)
    (tmp_path / "trace").write_text("in the way")
    file = recorder.TraceFile(str(tmp_path / "trace"), [0], 1, SimpleNamespace(pp=Group(1), world=Group(1)))
    step = RoutingTrace(np.ones((1, 1, 2, 4), dtype=np.int32))
    assert "trace" in file.add(step)
    (tmp_path / "trace").unlink()
    assert file.add(step) == ""
    assert load_trace(tmp_path / "trace" / "routing.npz").num_steps == 2


def test_a_stage_without_layers_keeps_nothing():
    groups = SimpleNamespace(ep=Group(2), stage=Group(2), expert_tp=Group(1))
    recording = recorder.RoutingRecorder([], groups, MoESizes(2, 1, 8, 8, False, torch.float32, False))
    for iteration in range(5):
        recording.end_step(1)
        recording.mark(iteration)
    assert recording.gather() is None
    assert recording._windows == []
