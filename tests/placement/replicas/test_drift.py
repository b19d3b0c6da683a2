"""Plausible loads: what they are drawn from."""

import numpy as np

from megatron_scalemoe.placement.replicas.drift import plausible_loads


def test_an_idle_step_is_no_drift():
    loads_SE = np.random.default_rng(0).integers(90, 110, (5, 16)).astype(float)
    with_idle = np.insert(loads_SE, [2, 5], 0.0, axis=0)
    for found, expected in zip(*(plausible_loads(x, 12, np.random.default_rng(1)) for x in (with_idle, loads_SE)), strict=True):
        np.testing.assert_array_equal(found, expected)
