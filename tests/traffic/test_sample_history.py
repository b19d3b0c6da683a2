"""What each sample chose when it was last computed."""

import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.sample_history import SampleHistory

PLAN = PlacementPlan.contiguous(2, 2, 4)


def counts_of(seed: int, samples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 100, (samples, 2, 4))


def test_hosted_selections_of_seen_samples():
    history, counts_BLE = SampleHistory(2, 4), counts_of(0, 3)
    history.record(np.array([7, 5, 10**12]), counts_BLE)
    hosted = history.hosted(np.array([5, 6, 10**12]), PLAN)
    for row, sample in ((0, 1), (2, 2)):
        assert hosted[row].tolist() == [counts_BLE[sample].sum(), counts_BLE[sample, :, :2].sum(), counts_BLE[sample, :, 2:].sum()]
    assert not hosted[1].any()


def test_the_last_visit_counts():
    history = SampleHistory(2, 4)
    history.record(np.array([3]), counts_of(0, 1))
    history.record(np.array([3]), counts_of(1, 1))
    assert len(history) == 1
    assert history.hosted(np.array([3]), PLAN)[0, 0] == counts_of(1, 1).sum()


def test_the_oldest_make_room():
    history = SampleHistory(2, 4, max_bytes=3 * 2 * 2 * 4)
    history.record(np.arange(5), counts_of(0, 5))
    assert len(history) == 3
    seen = history.hosted(np.arange(5), PLAN)[:, 0]
    assert (seen == np.where(np.arange(5) < 2, 0, counts_of(0, 5).sum(axis=(1, 2)))).all()
