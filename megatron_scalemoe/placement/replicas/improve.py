"""Improvement of a placement with replicas by moves: first for balance, over many loads at once; then for cost.

For balance: under the best split, the largest rank load is that of the worst set of ranks R (a cut): tokens of the experts with all their
hosts in R, divided by |R| (max flow = min cut). Cuts found for one placement are lower bounds for every other; so a pool of them rejects
most of hundreds of moves in a few array operations, and only the most promising one is split exactly, which either is an improvement or
adds the cuts that were missing. For cost: random moves, each judged in full, exchange and price of replicas included.

A move is a row of six integers: expert, from rank, to rank, and the same of a second expert. E (as expert) and G (as rank) stand for none:
(e, a, b, f, b, a) swaps e on a with f on b; (e, G, b, f, b, G) gives f's slot on b to e; (e, a, b, E, G, G) moves e's replica.

Suffixes: B loads (cases), G ranks, E logical experts, K cuts, M moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.problem import Solution
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import balanced_max_load

MOVES_PER_DRAW = 512
LARGEST_POOL = 64
# Arrays of this many moves x cases x cuts stay in the cache.
_MOVES_AT_ONCE = 64
# Draws without a promising move before the search for balance ends.
PATIENCE = 6
# Smaller gains, relative to the largest load, are not worth a move.
SMALLEST_GAIN = 2e-4
_POLISHING_MOVES_PER_DRAW = 16


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many replicas there may be in total and on a rank; fixed_homes: only replicas move."""

    replicas: int
    per_rank: int
    fixed_homes: bool = False


def improve(
    start: Solution,
    loads_BE: np.ndarray,
    weight_B: np.ndarray,
    cost_us: Callable[[Solution, float], float],
    limits: Limits,
    *,
    draws: int,
    rng: np.random.Generator,
    budget: Budget,
) -> Solution:
    """The best placement found, by `cost_us(placement, weighted mean of the largest rank load)`, in `draws` rounds of moves."""
    best = start
    largest_B, cuts_BG = balanced_max_load(loads_BE, best.hosts)
    value, pool_KG, idle = float(weight_B @ largest_B), np.unique(cuts_BG, axis=0), 0
    best_us = cost_us(best, value)
    for _ in range(draws):
        above_B = weight_B * np.where(cuts_BG.all(axis=1), 0.0, largest_B - loads_BE.mean(axis=1) * (loads_BE.shape[1] / cuts_BG.shape[1]))
        smallest_gain = SMALLEST_GAIN * value
        if idle >= PATIENCE or above_B.sum() < smallest_gain or budget.over():
            break
        moves = draw_moves(best, cuts_BG, above_B, MOVES_PER_DRAW, limits, rng=rng)
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


def polish(
    start: Solution,
    plain_us: Callable[[Solution], float],
    cost_us: Callable[[Solution], float],
    limits: Limits,
    *,
    trials: int,
    rng: np.random.Generator,
    budget: Budget,
) -> Solution:
    """The placement after `trials` random moves, of which those are kept that lower both costs.

    plain_us: cost of the mean traffic, the quicker one. cost_us: with what drift adds.
    """
    best, best_plain_us, best_us = start, plain_us(start), cost_us(start)
    ranks = start.hosts.shape[1]
    each_rank_GG, weight_G = np.eye(ranks, dtype=bool), np.ones(ranks)
    tried_moves = 0
    while ranks > 1 and tried_moves < trials:
        moves = draw_moves(best, each_rank_GG, weight_G, _POLISHING_MOVES_PER_DRAW, limits, rng=rng)
        tried_moves += _POLISHING_MOVES_PER_DRAW - len(moves)
        for move in moves:
            if budget.over():
                return best
            tried_moves += 1
            tried = moved(best, move)
            tried_plain_us = plain_us(tried)
            if tried_plain_us < best_plain_us and (tried_us := cost_us(tried)) < best_us:
                best, best_plain_us, best_us = tried, tried_plain_us, tried_us
                break
    return best


def draw_moves(
    solution: Solution, cuts_BG: np.ndarray, weight_B: np.ndarray, number: int, limits: Limits, *, rng: np.random.Generator
) -> np.ndarray:
    """int64 [M, 6], M at most `number`: random moves that may take load out of the cuts.

    cuts_BG: bool, the ranks that cause the largest load of each case. weight_B: how often each cut is worked on; 0 for cuts of all ranks.
    """
    experts, ranks = solution.hosts.shape
    homes, copies = _homes_by_rank(solution.home_rank, ranks), _replicas_by_rank(solution, limits.per_rank)
    cut_MG = cuts_BG[rng.choice(weight_B.size, number, p=weight_B / weight_B.sum())]
    inside = np.where(cut_MG, rng.random(cut_MG.shape), -1).argmax(axis=1)
    outside = np.where(cut_MG, -1, rng.random(cut_MG.shape)).argmax(axis=1)
    kinds = [0, number // 2, number] if limits.fixed_homes else [number // 3, 2 * (number // 3), number]
    swaps, slots, gifts = slice(0, kinds[0]), slice(kinds[0], kinds[1]), slice(kinds[1], None)

    def pick(table: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return table[rank, rng.integers(table.shape[1], size=rank.size)]

    first = np.concatenate([pick(homes, inside[swaps]), pick(copies, inside[slots]), pick(np.hstack([homes, copies]), inside[gifts])])
    second = np.concatenate([pick(homes, outside[swaps]), pick(copies, outside[slots]), pick(copies, outside[gifts])])
    moves = np.stack([first, inside, outside, second, outside, inside], axis=1)
    moves[gifts, 1] = moves[gifts, 5] = ranks
    moves[second == EMPTY, 3:] = experts, ranks, ranks
    moves = moves[(first != EMPTY) & (first != second)]
    held = np.zeros((experts + 1, ranks + 1), dtype=bool)
    held[:experts, :ranks] = solution.hosts
    moves = moves[~held[moves[:, 0], moves[:, 2]] & ~held[moves[:, 3], moves[:, 5]]]
    adds = (moves[:, 1] == ranks) & (moves[:, 3] == experts)
    return moves if solution.hosts.sum() < experts + limits.replicas else moves[~adds]


def moved(solution: Solution, move: np.ndarray) -> Solution:
    """The placement after one move; homes follow their expert."""
    hosts_EG, home_rank_E = solution.hosts.copy(), solution.home_rank.copy()
    experts, ranks = hosts_EG.shape
    for expert, left, joined in (move[:3], move[3:]):
        if expert == experts:
            continue
        if left < ranks:
            hosts_EG[expert, left] = False
            if home_rank_E[expert] == left:
                home_rank_E[expert] = joined
        if joined < ranks:
            hosts_EG[expert, joined] = True
    return Solution(home_rank_E, hosts_EG)


def _homes_by_rank(home_rank_E: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [G, E/G]."""
    return np.argsort(home_rank_E, kind="stable").reshape(ranks, -1)


def _replicas_by_rank(solution: Solution, per_rank: int) -> np.ndarray:
    """int64 [G, per_rank], EMPTY where there is room."""
    experts, ranks = solution.hosts.shape
    is_replica_EG = solution.hosts.copy()
    is_replica_EG[np.arange(experts), solution.home_rank] = False
    rank, expert = np.nonzero(is_replica_EG.T)
    table = np.full((ranks, per_rank), EMPTY)
    table[rank, np.arange(rank.size) - np.searchsorted(rank, rank)] = expert
    return table
