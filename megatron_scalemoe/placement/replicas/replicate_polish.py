"""Last improvement of a placement with replicas: random moves, each judged by the full cost, exchange and price of replicas included.

`replicate_search` looks at the largest rank load alone, which is what replicas are for; what remains is mostly exchange time.
Suffixes: G ranks, E logical experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.problem import Solution
from megatron_scalemoe.placement.replicas.replicate_moves import draw_moves, moved

_MOVES_PER_DRAW = 16


def polish(
    start: Solution,
    plain_us: Callable[[Solution], float],
    cost_us: Callable[[Solution], float],
    *,
    replicas: int,
    per_rank: int,
    trials: int,
    rng: np.random.Generator,
    deadline: float,
    fixed_homes: bool = False,
) -> Solution:
    """The placement after `trials` random moves, of which those are kept that lower both costs.

    plain_us: cost of the mean traffic, the quicker one. cost_us: with what drift adds. deadline: a `time.monotonic()` value.
    fixed_homes: only replicas move.
    """
    best, best_plain_us, best_us = start, plain_us(start), cost_us(start)
    ranks = start.hosts.shape[1]
    each_rank_GG, weight_G = np.eye(ranks, dtype=bool), np.ones(ranks)
    tried_moves = 0
    while ranks > 1 and tried_moves < trials:
        limits = {"replicas": replicas, "per_rank": per_rank, "fixed_homes": fixed_homes}
        moves = draw_moves(best, each_rank_GG, weight_G, _MOVES_PER_DRAW, rng=rng, **limits)
        tried_moves += _MOVES_PER_DRAW - len(moves)
        for move in moves:
            if time.monotonic() > deadline:
                return best
            tried_moves += 1
            tried = moved(best, move)
            tried_plain_us = plain_us(tried)
            if tried_plain_us < best_plain_us and (tried_us := cost_us(tried)) < best_us:
                best, best_plain_us, best_us = tried, tried_plain_us, tried_us
                break
    return best
