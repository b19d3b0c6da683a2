"""Local search over homes, the default: from greedy homes the best swap of two experts, again and again; then kicks of the best placement,
each followed by a descent, a fixed number of times."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes, solve_greedy
from megatron_scalemoe.placement.solvers.port_model import port_model
from megatron_scalemoe.placement.solvers.swap_table import SwapTable

# Candidate swaps judged at once: all of them up to 90 experts, a sample above.
_CANDIDATES = 4096
# A gain below this part of the cost is rounding.
LEAST_GAIN = 1e-9
# Of the kicks, those that exchange two ranks.
_WHOLE_RANKS = 0.3
# Kicks, and swaps of all descents together: one takes 2 ms (64 experts on 8 ranks) to 6 ms (1,024 on 1,024).
_KICKS, SWAPS = 60, 500


def solve_local_search(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E] home ranks, never worse than the contiguous and the greedy ones.

    progress: called with each better cost in us (at the ports, without latencies).
    """
    table = SwapTable(port_model(problem), contiguous_homes(problem))
    contiguous_us = table.objective_us
    table.reset(solve_greedy(problem, rng=rng, budget=budget))
    if contiguous_us < table.objective_us:
        table.reset(contiguous_homes(problem))
    best_E, best, best_us = table.home_rank_E.copy(), table.objective_us, table.total_us
    swaps = budget.iterations(SWAPS)
    for _ in range(budget.iterations(_KICKS)):
        swaps -= descend(table, swaps, rng=rng, budget=budget)
        if table.total_us < best_us * (1 - LEAST_GAIN) or (table.total_us <= best_us and table.objective_us < best):
            best_E, best, best_us = table.home_rank_E.copy(), table.objective_us, table.total_us
            if progress:
                progress(best_us)
        if swaps <= 0 or budget.over():
            break
        table.reset(kick(best_E, problem.load, rng))
    return best_E


def descend(table: SwapTable, most: int, *, rng: np.random.Generator, budget: Budget) -> int:
    """Takes the best swap until none is better, at most `most` times: among the busiest ranks' experts, else among all (or a sample, if
    there are many). Returns how many it looked for."""
    for looked in range(1, most + 1):
        below = table.objective_us * (1 - LEAST_GAIN)
        for e_K, f_K in (_pairs_of_busiest(table, rng), _pairs_of_all(table, rng)):
            objective_K = table.objectives(e_K, f_K, below)
            if objective_K.size and objective_K.min() < below:
                best = objective_K.argmin()
                table.swap(e_K[best], f_K[best])
                break
        else:
            return looked
        if budget.over():
            return looked
    return most


def kick(home_rank_E: np.ndarray, load_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [E]: a copy, disturbed in a way that no single swap undoes: the homes of a few random experts passed around; or all experts of
    the fullest rank exchanged with another's: a hot expert can only move together with the light ones that keep it company.
    """
    load_G = np.bincount(home_rank_E, load_E)
    if rng.random() < _WHOLE_RANKS:
        order_G = np.arange(load_G.size)
        fullest, other = load_G.argmax(), rng.integers(load_G.size)
        order_G[[fullest, other]] = order_G[[other, fullest]]
        return order_G[home_rank_E]
    kicked_E = home_rank_E.copy()
    moved = rng.choice(home_rank_E.size, size=min(int(rng.integers(4, 12)), home_rank_E.size), replace=False)
    kicked_E[moved] = kicked_E[np.roll(moved, 1)]
    return kicked_E


def _pairs_of_busiest(table: SwapTable, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Experts of the busiest ranks, each with every expert elsewhere."""
    home_rank_E = table.home_rank_E
    busy = np.flatnonzero(np.isin(home_rank_E, table.busiest_ranks()))
    e_K, f_K = np.repeat(busy, home_rank_E.size), np.tile(np.arange(home_rank_E.size), busy.size)
    if e_K.size > _CANDIDATES:
        chosen = rng.integers(e_K.size, size=_CANDIDATES)
        e_K, f_K = e_K[chosen], f_K[chosen]
    return _of_different_ranks(e_K, f_K, home_rank_E)


def _pairs_of_all(table: SwapTable, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    experts = table.home_rank_E.size
    if experts * (experts - 1) // 2 <= _CANDIDATES:
        return _of_different_ranks(*np.triu_indices(experts, 1), table.home_rank_E)
    return _of_different_ranks(*rng.integers(experts, size=(2, _CANDIDATES)), table.home_rank_E)


def _of_different_ranks(e_K: np.ndarray, f_K: np.ndarray, home_rank_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    different = home_rank_E[e_K] != home_rank_E[f_K]
    return e_K[different], f_K[different]
