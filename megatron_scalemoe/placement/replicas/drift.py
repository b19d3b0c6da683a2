"""Loads to judge a placement by: the recorded steps, and plausible drift from there, as plans are always older than the traffic."""

from __future__ import annotations

import numpy as np

# Standard deviation of the log of an expert's load from step to step where a single step was recorded: the drift of the recorded run.
DEFAULT_DRIFT = 0.15
_DRIFT_RANGE = (0.03, 0.5)
# In an old plan the drift has grown; traces show 1.5 to 3 times that of one step after 50 steps.
_DRIFT_GROWTH = (1.0, 3.0)


def plausible_loads(loads_SE: np.ndarray, cases: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """float64 [B, E] loads, B = `cases`, all with the same total; float64 [B], their weights, with sum 1.

    One half of the weight: recorded steps, evenly spaced (up to half of the cases). The other half: drawn around their mean by lognormal
    changes of each expert, from as large as between recorded steps to three times that; in opposite pairs, so that few cases suffice.

    loads_SE: float [S, E], oldest first, not all 0; whoever wants the latest traffic to count gives the latest steps only. Steps without
    tokens are left out.
    """
    loads_SE = loads_SE[loads_SE.any(axis=1)]
    center_E = loads_SE.mean(axis=0)
    number = min(len(loads_SE), max(1, cases // 2))
    # The last step is always among them.
    recorded_SE = loads_SE[len(loads_SE) - 1 - np.arange(number) * len(loads_SE) // number]
    drawn = cases - number
    noise = rng.standard_normal((-(-drawn // 2), center_E.size))
    growth = np.linspace(*_DRIFT_GROWTH, len(noise))[:, None]
    change = _drift_per_step(loads_SE) * growth * noise
    drawn_BE = center_E * np.exp(np.stack([change, -change], axis=1).reshape(-1, center_E.size))[:drawn]
    loads_BE = np.concatenate([recorded_SE, drawn_BE])
    weight_B = np.full(len(loads_BE), 0.5 / max(drawn, 1))
    weight_B[:number] = 0.5 / number
    return loads_BE * (center_E.sum() / loads_BE.sum(axis=1, keepdims=True)), weight_B / weight_B.sum()


def _drift_per_step(loads_SE: np.ndarray) -> float:
    """Root mean square of the log of load(step + 1) / load(step), over selections, so that rare experts count little."""
    if len(loads_SE) < 2:
        return DEFAULT_DRIFT
    before, after = loads_SE[:-1], loads_SE[1:]
    weight = before + after
    squared = np.square(np.log((after + 1.0) / (before + 1.0)))
    return float(np.clip(np.sqrt((weight * squared).sum() / weight.sum()), *_DRIFT_RANGE))
