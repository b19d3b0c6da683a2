"""Improvement of a placement with replicas: the largest rank load under the best split, over many loads at once.

Under the best split, the largest rank load is that of the worst set of ranks R (a cut): tokens of the experts with all their hosts in R,
divided by |R| (max flow = min cut). Cuts found for one placement are lower bounds for every other; so a pool of them rejects most of
hundreds of moves in a few array operations, and only the most promising one is split exactly, which either is an improvement or adds
the cuts that were missing.

Suffixes: B loads (cases), G ranks, E logical experts, K cuts, M moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.problem import Solution
from megatron_scalemoe.placement.replicas.replicate_moves import draw_moves, moved
from megatron_scalemoe.plan.split import balanced_max_load

MOVES_PER_DRAW = 512
LARGEST_POOL = 64
# Arrays of this many moves x cases x cuts stay in the cache.
_MOVES_AT_ONCE = 64
# Draws without a promising move before the search ends.
PATIENCE = 6
# Smaller gains, relative to the largest load, are not worth a move.
SMALLEST_GAIN = 2e-4


def improve(
    start: Solution,
    loads_BE: np.ndarray,
    weight_B: np.ndarray,
    cost_us: Callable[[Solution, float], float],
    *,
    replicas: int,
    per_rank: int,
    draws: int,
    rng: np.random.Generator,
    deadline: float,
    fixed_homes: bool = False,
) -> Solution:
    """The best placement found, by `cost_us(placement, weighted mean of the largest rank load)`, in `draws` rounds of moves.

    replicas, per_rank: how many are allowed in total and on a rank. deadline: a `time.monotonic()` value. fixed_homes: only replicas move.
    """
    best = start
    largest_B, cuts_BG = balanced_max_load(loads_BE, best.hosts)
    value, pool_KG, idle = float(weight_B @ largest_B), np.unique(cuts_BG, axis=0), 0
    best_us = cost_us(best, value)
    for _ in range(draws):
        above_B = weight_B * np.where(cuts_BG.all(axis=1), 0.0, largest_B - loads_BE.mean(axis=1) * (loads_BE.shape[1] / cuts_BG.shape[1]))
        smallest_gain = SMALLEST_GAIN * value
        if idle >= PATIENCE or above_B.sum() < smallest_gain or time.monotonic() > deadline:
            break
        limits = {"replicas": replicas, "per_rank": per_rank, "fixed_homes": fixed_homes}
        moves = draw_moves(best, cuts_BG, above_B, MOVES_PER_DRAW, rng=rng, **limits)
        bound_M = lower_bounds(best, moves, pool_KG, loads_BE, weight_B)
        if not moves.size or bound_M.min() >= value - smallest_gain:
            idle += 1
            continue
        tried = moved(best, moves[bound_M.argmin()])
        tried_B, tried_cuts_BG = balanced_max_load(loads_BE, tried.hosts)
        pool_KG = _newest_first(tried_cuts_BG, pool_KG)
        tried_value = float(weight_B @ tried_B)
        if tried_value < value - smallest_gain and (tried_us := cost_us(tried, tried_value)) < best_us:
            best, best_us, value, largest_B, cuts_BG, idle = tried, tried_us, tried_value, tried_B, tried_cuts_BG, 0
    return best


def lower_bounds(solution: Solution, moves: np.ndarray, pool_KG: np.ndarray, loads_BE: np.ndarray, weight_B: np.ndarray) -> np.ndarray:
    """float64 [M]: lower bounds of the weighted mean of the largest rank load after each move, from cuts `pool_KG` (bool)."""
    experts, ranks = solution.hosts.shape
    beyond_GK = np.zeros((ranks + 1, len(pool_KG)), dtype=np.float32)
    beyond_GK[:ranks] = ~pool_KG.T
    outside_EK = np.ones((experts + 1, len(pool_KG)), dtype=np.float32)  # how many hosts of each expert are not in the cut
    outside_EK[:experts] = solution.hosts.astype(np.float32) @ beyond_GK[:ranks]
    load_EB = np.zeros((experts + 1, len(loads_BE)), dtype=np.float32)
    load_EB[:experts] = loads_BE.T
    per_rank_K = 1 / pool_KG.sum(axis=1, dtype=np.float32)
    inside_BK = load_EB.T @ (outside_EK == 0) * per_rank_K
    bound_M = np.empty(len(moves))
    for first in range(0, len(moves), _MOVES_AT_ONCE):
        some = moves[first : first + _MOVES_AT_ONCE]
        load_MBK = inside_BK
        for expert, left, joined in (some[:, :3].T, some[:, 3:].T):
            before_MK = outside_EK[expert]
            after_MK = before_MK - beyond_GK[left] + beyond_GK[joined]
            gain_MK = ((after_MK == 0) * per_rank_K) - ((before_MK == 0) * per_rank_K)
            load_MBK = load_MBK + load_EB[expert][:, :, None] * gain_MK[:, None, :]
        bound_M[first : first + len(some)] = load_MBK.max(axis=2) @ weight_B
    return bound_M


def _newest_first(new_KG: np.ndarray, pool_KG: np.ndarray) -> np.ndarray:
    both_KG = np.concatenate([new_KG, pool_KG])
    _, first = np.unique(both_KG, axis=0, return_index=True)
    return both_KG[np.sort(first)[:LARGEST_POOL]]
