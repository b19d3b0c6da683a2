"""Memetic search: a small population of local optima, bred by ScaleMoE's crossover, each child improved by local search."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes, solve_greedy, solve_random
from megatron_scalemoe.placement.solvers.clustering import solve_clustering
from megatron_scalemoe.placement.solvers.genetic import homes_of_slots, order_based_crossover
from megatron_scalemoe.placement.solvers.hierarchical import hierarchical_homes
from megatron_scalemoe.placement.solvers.local_search import LEAST_GAIN, descend, kick
from megatron_scalemoe.placement.solvers.port_model import port_model
from megatron_scalemoe.placement.solvers.swap_delta import SwapTable

_POPULATION = 8
_KICK_RATE = 0.5
# Children without a better placement before the search ends.
_PATIENCE = 80
# Clustering is the one start that takes time: at most this share of it.
_CLUSTERING_SHARE = 0.2

Population = list[tuple[float, np.ndarray]]


def solve_memetic(
    problem: LayerProblem, *, rng: np.random.Generator, deadline: float, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """int64 [E] home ranks. Starts: contiguous, greedy, hierarchical, clustering and a random one; never worse than the best of those.

    deadline: a `time.monotonic()` value. progress: called with each better cost in us (at the ports, without latencies).
    """
    table = SwapTable(port_model(problem), contiguous_homes(problem))
    starts = _starts(problem, table, rng, deadline)
    best_us, best_E = min(((total_us, home_E) for _, total_us, home_E in starts), key=lambda start: start[0])
    population: Population = []
    stale = 0
    waiting = [home_E for _, _, home_E in starts]
    while stale < _PATIENCE and time.monotonic() < deadline:
        table.reset(waiting.pop(0) if waiting else _child(population, best_E, problem.load, rng))
        descend(table, rng=rng, deadline=deadline)
        _join(population, table)
        stale += not waiting
        if table.total_us < best_us * (1 - LEAST_GAIN):
            best_us, best_E, stale = table.total_us, table.home_rank_E.copy(), 0
            if progress:
                progress(best_us)
    return best_E


def _starts(problem: LayerProblem, table: SwapTable, rng: np.random.Generator, deadline: float) -> list[tuple[float, float, np.ndarray]]:
    """(objective, total, homes), the most promising first: if the time ends early, it was spent on that one."""
    clustering_deadline = time.monotonic() + _CLUSTERING_SHARE * max(0.0, deadline - time.monotonic())
    homes = [contiguous_homes(problem)]
    homes += [solve(problem, rng=rng, deadline=deadline) for solve in (solve_greedy, hierarchical_homes)]
    homes += [solve_clustering(problem, rng=rng, deadline=clustering_deadline)]
    homes += [solve_random(problem, rng=rng, deadline=deadline)]
    starts = []
    for home_rank_E in homes:
        table.reset(home_rank_E)
        starts.append((table.objective_us, table.total_us, home_rank_E))
    return sorted(starts, key=lambda start: start[0])


def _child(population: Population, best_E: np.ndarray, load_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [E]: the best placement with a kick, or a cross of two of the population."""
    if rng.random() < _KICK_RATE or len(population) < 2:
        return kick(best_E, load_E, rng)
    mother_E, father_E = (population[i][1] for i in rng.choice(len(population), size=2, replace=False))
    slots_E = order_based_crossover(np.argsort(mother_E, kind="stable"), np.argsort(father_E, kind="stable"), rng)
    return homes_of_slots(slots_E, np.sort(mother_E))


def _join(population: Population, table: SwapTable) -> None:
    """Adds the table's placement unless the population has its equal; the worst leaves."""
    if any(abs(objective - table.objective_us) <= LEAST_GAIN * objective for objective, _ in population):
        return
    population.append((table.objective_us, table.home_rank_E.copy()))
    population.sort(key=lambda member: member[0])
    del population[_POPULATION:]
