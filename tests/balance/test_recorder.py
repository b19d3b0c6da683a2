import dataclasses
from types import SimpleNamespace

import torch

from megatron_scalemoe.balance import recorder
from megatron_scalemoe.balance.model import MoESizes


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
