"""Moves that change a placement with replicas a little: two copies swap ranks, a replica moves, another expert takes its slot.

A move is a row of six integers: expert, from rank, to rank, and the same of a second expert. E (as expert) and G (as rank) stand for none:
(e, a, b, f, b, a) swaps e on a with f on b; (e, G, b, f, b, G) gives f's slot on b to e; (e, a, b, E, G, G) moves e's replica.

Suffixes: B loads (cases), G ranks, E logical experts, M moves.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.placement.problem import Solution
from megatron_scalemoe.plan.placement_plan import EMPTY


def draw_moves(
    solution: Solution,
    cuts_BG: np.ndarray,
    weight_B: np.ndarray,
    number: int,
    *,
    replicas: int,
    per_rank: int,
    rng: np.random.Generator,
    fixed_homes: bool = False,
) -> np.ndarray:
    """int64 [M, 6], M at most `number`: random moves that may take load out of the cuts.

    cuts_BG: bool, the ranks that cause the largest load of each case. weight_B: how often each cut is worked on; 0 for cuts of all ranks.
    fixed_homes: only moves of replicas, which leave all homes where they are.
    """
    experts, ranks = solution.hosts.shape
    homes, copies = _homes_by_rank(solution.home_rank, ranks), _replicas_by_rank(solution, per_rank)
    cut_MG = cuts_BG[rng.choice(weight_B.size, number, p=weight_B / weight_B.sum())]
    inside = np.where(cut_MG, rng.random(cut_MG.shape), -1).argmax(axis=1)
    outside = np.where(cut_MG, -1, rng.random(cut_MG.shape)).argmax(axis=1)
    kinds = [0, number // 2, number] if fixed_homes else [number // 3, 2 * (number // 3), number]
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
    return moves if solution.hosts.sum() < experts + replicas else moves[~adds]


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
