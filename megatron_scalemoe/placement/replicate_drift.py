"""Loads to judge a placement by: what was recorded last, and plausible drift from there, as plans are always older than the traffic."""

from __future__ import annotations

import numpy as np

# Recorded steps that count, each half as much as the one after it.
RECENT_STEPS = 6
# Standard deviation of the log of an expert's load from step to step where a single step was recorded: the drift of the recorded run.
DEFAULT_DRIFT = 0.15
_DRIFT_RANGE = (0.03, 0.5)
# In an old plan the drift has grown; traces show 1.5 to 3 times that of one step after 50 steps.
_DRIFT_GROWTH = (1.0, 3.0)


def expected_load(loads_SE: np.ndarray) -> np.ndarray:
    """float64 [E]: the load expected next: the mean of the last steps, the later the heavier, scaled to the mean total of a step."""
    recent_SE = loads_SE[-RECENT_STEPS:]
    weight_S = 0.5 ** np.arange(len(recent_SE))[::-1]
    load_E = weight_S @ recent_SE
    if not load_E.any():
        return loads_SE.mean(axis=0)
    return load_E * (loads_SE.sum() / len(loads_SE) / load_E.sum())


def plausible_loads(loads_SE: np.ndarray, cases: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """float64 [B, E] loads, B = `cases`, all with the same total; float64 [B], their weights, with sum 1.

    One half of the weight: the last recorded steps (up to a third of the cases, at least one), each with half the weight of the next one.
    The other half: drawn around `expected_load` by lognormal changes of each expert, from as large as between recorded steps to three times
    that; in opposite pairs, so that few cases suffice.

    loads_SE: float [S, E], oldest first, not all 0. A recent step without tokens counts as the expected load.
    """
    center_E = expected_load(loads_SE)
    recorded_SE = loads_SE[-min(RECENT_STEPS, max(1, cases // 3)) :]
    recorded_SE = np.where(recorded_SE.any(axis=1, keepdims=True), recorded_SE, center_E)
    drawn = cases - len(recorded_SE)
    noise = rng.standard_normal((-(-drawn // 2), center_E.size))
    growth = np.linspace(*_DRIFT_GROWTH, len(noise))[:, None]
    change = _drift_per_step(loads_SE) * growth * noise
    drawn_BE = center_E * np.exp(np.stack([change, -change], axis=1).reshape(-1, center_E.size))[:drawn]
    loads_BE = np.concatenate([recorded_SE, drawn_BE])
    weight_B = np.concatenate([0.5 ** np.arange(len(recorded_SE))[::-1], np.zeros(drawn)])
    weight_B *= 0.5 / weight_B.sum()
    weight_B[len(recorded_SE) :] = 0.5 / max(drawn, 1)
    return loads_BE * (center_E.sum() / loads_BE.sum(axis=1, keepdims=True)), weight_B


def _drift_per_step(loads_SE: np.ndarray) -> float:
    """Root mean square of the log of load(step + 1) / load(step), over selections, so that rare experts count little."""
    if len(loads_SE) < 2:
        return DEFAULT_DRIFT
    before, after = loads_SE[:-1], loads_SE[1:]
    weight = before + after
    if not weight.any():
        return DEFAULT_DRIFT
    squared = np.square(np.log((after + 1.0) / (before + 1.0)))
    return float(np.clip(np.sqrt((weight * squared).sum() / weight.sum()), *_DRIFT_RANGE))
