"""ScaleMoE's genetic algorithm (PACT'25, "topology-aware expert remapping"): a permutation, uniform order-based crossover, swap mutation.

A chromosome lists the experts slot by slot; rank r has the slots r*E/G up to (r+1)*E/G. Only its fitness is open: ours, or the paper's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes

_POPULATION = 32
_ELITE = 4
_MUTATION_RATE = 0.5
_GENERATIONS = 400
# Generations without a better individual before the search ends.
_PATIENCE = 100

Fitness = Callable[[LayerProblem, np.ndarray], float]


def solve_genetic(
    problem: LayerProblem,
    *,
    rng: np.random.Generator,
    budget: Budget,
    progress: Callable[[float], None] | None = None,
    fitness: Fitness = home_cost_us,
) -> np.ndarray:
    """int64 [E] home ranks. fitness: of a problem and home ranks, to be minimised. progress: called with each better fitness."""
    ranks_E = contiguous_homes(problem)

    def judge(slots_E: np.ndarray) -> float:
        return fitness(problem, homes_of_slots(slots_E, ranks_E))

    population = [np.arange(ranks_E.size)] + [rng.permutation(ranks_E.size) for _ in range(_POPULATION - 1)]
    values = [judge(slots_E) for slots_E in population]
    stale = 0
    for _ in range(budget.iterations(_GENERATIONS)):
        order = np.argsort(values, kind="stable")
        best = values[order[0]]
        children = [population[i] for i in order[:_ELITE]]
        child_values = [values[i] for i in order[:_ELITE]]
        while len(children) < _POPULATION:
            if budget.over():
                return homes_of_slots(children[int(np.argmin(child_values))], ranks_E)
            # Tournaments of two.
            mother, father = (population[min(rng.integers(_POPULATION, size=2), key=values.__getitem__)] for _ in range(2))
            child_E = order_based_crossover(mother, father, rng)
            if rng.random() < _MUTATION_RATE:
                i, j = rng.integers(child_E.size, size=2)
                child_E[[i, j]] = child_E[[j, i]]
            children.append(child_E)
            child_values.append(judge(child_E))
        population, values = children, child_values
        stale = 0 if min(values) < best else stale + 1
        if progress and not stale:
            progress(min(values))
        if stale >= _PATIENCE:
            break
    return homes_of_slots(population[int(np.argmin(values))], ranks_E)


def solve_genetic_paper(
    problem: LayerProblem, *, rng: np.random.Generator, budget: Budget, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """`solve_genetic` with the paper's own fitness."""
    return solve_genetic(problem, rng=rng, budget=budget, progress=progress, fitness=paper_fitness)


def homes_of_slots(slots_E: np.ndarray, ranks_E: np.ndarray) -> np.ndarray:
    """int64 [E]: the rank of each expert. slots_E: the expert in each slot; ranks_E: the rank of each slot."""
    home_rank_E = np.empty_like(ranks_E)
    home_rank_E[slots_E] = ranks_E
    return home_rank_E


def order_based_crossover(mother_E: np.ndarray, father_E: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int [E]: a random half of the mother's genes stay put, the others take the father's order (Davis 1991, uniform order-based)."""
    free_E = rng.random(mother_E.size) < 0.5
    place_in_father_E = np.argsort(father_E)
    missing = mother_E[free_E]
    child_E = mother_E.copy()
    child_E[free_E] = missing[np.argsort(place_in_father_E[missing])]
    return child_E


def paper_fitness(problem: LayerProblem, home_rank_E: np.ndarray) -> float:
    """The paper's: the sum over pairs of ranks of ((b s - CM[i][j]) h) / BM[i][j], in us.

    b s: tokens of rank i. CM[i][j]: those that rank j's experts cover. h: bytes of a row. BM: bandwidth of the pair alone. As printed, it
    counts the tokens that a pair does *not* exchange, and knows neither load nor the busiest port: here for comparison only.
    """
    counts_GE = problem.traffic.counts
    tokens_G = counts_GE.sum(axis=1) / problem.traffic.topk
    covered_GG = counts_GE @ Solution.without_replicas(home_rank_E, problem.num_ranks).hosts
    bytes_GG = (tokens_G[:, None] - covered_GG) * problem.cost.row_bytes
    return float((bytes_GG / problem.ports.pair_GBps()).sum()) / 1e3
