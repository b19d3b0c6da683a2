"""How popular each expert is, step by step: the distributions that synthetic traces are drawn from.

A popularity is a distribution over the E experts of a layer: the expected fraction of all selections. S steps, L layers.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.summary import gini, total_variation

# Steps after which a drifting expert has mostly forgotten where it was; bounds the long-run drift to about this^0.5 times that of one step.
REVERSION_STEPS = 50
BURST_FACTOR = 10.0
BURST_STEPS = 3
BURSTS_PER_STEP = 0.25
# A recorded training run without balance loss (docs/planner.md, "Synthetic traces"): its layers from first to last.
RECORDED_GINI = (0.92, 0.59)
RECORDED_DEAD = (0.50, 0.10)
# Makes the most popular expert stand out less: max/mean 12 at a Gini of .80.
RECORDED_SHIFT = 1.0
RECORDED_DRIFT = (1.5, 0.6)
# Part of the variance of one step's change that is forgotten at the next: drift over 50 steps is 1.5 to 3 times that over one.
RECORDED_NOISE = 0.8


def zipf(num_experts: int, exponent: float, shift: float = 0.0) -> np.ndarray:
    """float64 [E]: popularity of the i-th expert proportional to (i + shift)^-exponent (Zipf-Mandelbrot), most popular first."""
    weights_E = (np.arange(1, num_experts + 1) + shift) ** -exponent
    return weights_E / weights_E.sum()


def capped(popularity: np.ndarray, topk: int) -> np.ndarray:
    """Probabilities [..., E] that one token chooses each expert: topk x popularity, no more than 1, the excess spread over the others.

    A token chooses `topk` distinct experts, so each row sums to `topk`. At least `topk` experts of a row must have some popularity.
    """
    chosen = topk * popularity
    for _ in range(topk):
        full = chosen >= 1.0
        rest = np.where(full, 0.0, popularity)
        left = topk - full.sum(axis=-1, keepdims=True)
        chosen = np.where(full, 1.0, rest * (left / np.maximum(rest.sum(axis=-1, keepdims=True), np.finfo(float).tiny)))
    return chosen


def recorded_base(num_layers: int, num_experts: int, topk: int) -> np.ndarray:
    """float64 [L, E]: as skewed as the recorded run: Gini falls from .92 (first layer) to .59, dead experts from half to a tenth."""
    depth_L = np.linspace(0.0, 1.0, num_layers) if num_layers > 1 else np.array([0.5])
    base_LE = np.zeros((num_layers, num_experts))
    for layer, depth in enumerate(depth_L):
        dead = round(num_experts * (RECORDED_DEAD[0] + (RECORDED_DEAD[1] - RECORDED_DEAD[0]) * depth))
        alive = max(num_experts - dead, min(topk + 1, num_experts))
        target = RECORDED_GINI[0] + (RECORDED_GINI[1] - RECORDED_GINI[0]) * depth**1.5
        base_LE[layer, :alive] = _zipf_of_gini(target, alive, num_experts, topk)
    return base_LE


def _zipf_of_gini(target: float, alive: int, num_experts: int, topk: int) -> np.ndarray:
    """Capped Zipf over the `alive` experts whose Gini over all experts is `target`, or as near as it gets."""
    low, high = 0.0, 8.0
    for _ in range(40):
        middle = (low + high) / 2
        popularity = capped(zipf(alive, middle, RECORDED_SHIFT), topk) / topk
        low, high = (middle, high) if gini(np.pad(popularity, (0, num_experts - alive))) < target else (low, middle)
    return popularity


def drifting(base_LE: np.ndarray, steps: int, drift_L: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """float64 [S, L, E]: popularity that wanders around `base_LE`, and starts there.

    The logarithm of each expert's popularity walks at random, pulled back over `REVERSION_STEPS`; part `noise` of the variance of a step's
    change is independent from step to step. Its size is set so that the mean total variation between consecutive steps is `drift_L`.
    Experts of popularity 0 stay there. Raises `ScaleMoEError` when a layer cannot drift so far.
    """
    if steps == 1 or base_LE.shape[1] == 1 or not drift_L.any():
        return np.repeat(base_LE[None], steps, axis=0)
    shape = (steps, *base_LE.shape)
    walk = np.zeros(shape)
    kicks = rng.standard_normal(shape)
    for step in range(1, steps):
        walk[step] = walk[step - 1] * (1.0 - 1.0 / REVERSION_STEPS) + kicks[step]
    # The difference of two independent numbers has twice their variance.
    path = np.sqrt(1.0 - noise) * walk + np.sqrt(noise / 2.0) * rng.standard_normal(shape)
    size_L = drift_L.copy()
    for _ in range(30):
        popularity = _moved(base_LE, path * size_L[:, None])
        reached_L = total_variation(popularity[1:], popularity[:-1]).mean(axis=0)
        if np.allclose(reached_L, drift_L, rtol=1e-3, atol=0):
            return popularity
        size_L = np.minimum(size_L * drift_L / np.maximum(reached_L, np.finfo(float).tiny), 10.0)
    worst = int(np.argmin(reached_L / drift_L))
    problem = f"this popularity cannot change by a total variation of {drift_L[worst]:.3g} per step"
    raise ScaleMoEError(problem, found=f"at most about {reached_L[worst]:.3g} (layer {worst})", try_="a smaller drift", field=("drift",))


def _moved(base_LE: np.ndarray, change_SLE: np.ndarray) -> np.ndarray:
    popularity = base_LE * np.exp(change_SLE)
    return popularity / popularity.sum(axis=-1, keepdims=True)


def with_bursts(popularity_SLE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every few steps one expert of a layer is `BURST_FACTOR` times as popular as usual, for `BURST_STEPS` steps."""
    num_experts = popularity_SLE.shape[2]
    starts = rng.random(popularity_SLE.shape) < BURSTS_PER_STEP / num_experts
    active = starts.copy()
    for age in range(1, min(BURST_STEPS, len(starts))):
        active[age:] |= starts[:-age]
    popularity = np.where(active, BURST_FACTOR, 1.0) * popularity_SLE
    return popularity / popularity.sum(axis=-1, keepdims=True)
