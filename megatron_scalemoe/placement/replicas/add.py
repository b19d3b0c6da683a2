"""Replicas of experts: which, how many and where, so that the per-step split can even out the ranks, and only where they pay.

Suffixes: B loads (cases), G ranks, E logical experts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import placement_cost, solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicas.construct import balanced_homes, chained_replicas, eplb_shaped, packed_replicas
from megatron_scalemoe.placement.replicas.drift import plausible_loads
from megatron_scalemoe.placement.replicas.improve import Limits, improve, polish
from megatron_scalemoe.plan.split import balanced_max_load, balanced_shares

# Loads that a placement is judged by, and rounds of the search: 16 ranks x 32 experts get all, more experts fewer, as each takes longer.
CASES, FEWEST_CASES = 12, 4
DRAWS, FEWEST_DRAWS = 40, 6
_SMALL = 64  # experts + replicas
# Moves that are judged by their full cost, from each of two placements; far fewer for more experts.
TRIALS = 300
# Largest rank loads, relative to the mean, and parts of the replicas that are tried besides perfect balance and all replicas.
_TARGETS = (1.01, 1.03, 1.06, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0, 5.0)
_PARTS = (0.75, 0.5, 0.25)
# A price below this part of the cost is not worth a search.
_CHEAP = 0.002
# Trials to drop replicas that do not pay.
_DROPS = 100


def add_replicas(
    problem: LayerProblem,
    home_rank_E: np.ndarray,
    *,
    rng: np.random.Generator,
    budget: Budget,
    fixed_homes: bool = False,
    old: Solution | None = None,
) -> Solution:
    """Adds up to `problem.replicas` replicas to the homes (int [E]), and improves both; with `fixed_homes` the homes stay.

    The judge is `solution_cost` of the mean traffic, split as the runtime does, the price of the replicas included, plus what the largest
    rank load grows by over the recorded steps and plausible drift. It picks the best of several constructions (`construct`), or no replicas
    at all; then homes and replicas are improved together, first for balance, then for cost (`improve`), and replicas that do not pay are
    dropped. By this judge the result is never worse than the homes alone.

    old: a placement with these homes, where the search may start as well.
    """
    bare = Solution.without_replicas(np.asarray(home_rank_E, dtype=np.int64), problem.num_ranks)
    if not problem.replicas or not problem.load.any():
        return bare
    size = min(1.0, _SMALL / (problem.num_experts + problem.replicas)) ** 0.5
    judge = judge_of(problem, bare, *plausible_loads(problem.traffic.loads, max(FEWEST_CASES, round(CASES * size)), rng))
    limits = Limits(problem.replicas, problem.replica_slots_per_rank, fixed_homes)
    draws, trials = budget.iterations(DRAWS * size, FEWEST_DRAWS), budget.iterations(TRIALS * size**2)
    best, best_us = None, math.inf
    for start in _starts(judge, bare, old, fixed_homes):
        start_us = judge.cost_us(start)
        if best is None or start_us < best_us:
            best, best_us = start, start_us
        if budget.over():
            return best
    balanced = improve(best, judge.loads_BE, judge.weight_B, judge.cost_us, limits, draws=draws, rng=rng, budget=budget)
    others = [old] if old else [] if fixed_homes else [eplb_shaped(problem)]
    polished = [
        polish(start, judge.plain_us, judge.cost_us, limits, trials=trials, rng=rng, budget=budget)
        for start in (balanced, *others)
        if judge.cost_us(start) < math.inf
    ]
    return without_unpaid(judge, min([balanced, *polished], key=judge.cost_us), budget)


@dataclasses.dataclass(frozen=True, eq=False)
class _Judge:
    """What a placement costs. loads_BE, weight_B: the loads it should bear; us_per_token: what the cost grows by with the largest rank
    load; bare_us: the plain cost of the homes alone, which no result may exceed.
    """

    problem: LayerProblem
    loads_BE: np.ndarray
    weight_B: np.ndarray
    us_per_token: float
    bare_us: float

    def cost_us(self, solution: Solution, largest: float | None = None) -> float:
        """largest: the weighted mean of the largest rank load, if it is known."""
        plain = solution_cost(self.problem, solution)
        if plain.total_us > self.bare_us:
            return math.inf
        if largest is None:
            largest = float(self.weight_B @ balanced_max_load(self.loads_BE, solution.hosts)[0])
        return plain.total_us + self.us_per_token * (largest - plain.compute_us / self.problem.cost.compute_us_per_row)

    def plain_us(self, solution: Solution) -> float:
        """Of the mean traffic."""
        return solution_cost(self.problem, solution).total_us

    def price_us(self, solution: Solution) -> float:
        return replica_us(solution.home_rank, solution.hosts, self.problem.cost, self.problem.ports)


def judge_of(problem: LayerProblem, bare: Solution, loads_BE: np.ndarray, weight_B: np.ndarray) -> _Judge:
    bare_us = placement_cost(problem, bare.hosts.astype(np.float64)).total_us
    return _Judge(problem, loads_BE, weight_B, bare_us / float((problem.load @ bare.hosts).max()), bare_us)


def _starts(judge: _Judge, bare: Solution, old: Solution | None, fixed_homes: bool) -> Iterator[Solution]:
    """Constructions, the homes alone first."""
    problem, load_E, ranks = judge.problem, judge.problem.load, judge.problem.num_ranks
    per_rank, replicas, mean, node_G = problem.replica_slots_per_rank, problem.replicas, load_E.sum() / ranks, problem.ports.node_of_rank
    yield bare
    if old:
        yield old
    homes = [bare.home_rank] if fixed_homes else [bare.home_rank, balanced_homes(load_E, ranks)]

    def chained(homes_E: np.ndarray, own_node: bool, target: float = 1.0) -> Solution:
        return chained_replicas(load_E, homes_E, node_G, target=target * mean, replicas=replicas, per_rank=per_rank, own_node=own_node)

    kinds = [(homes_E, own_node) for homes_E in homes for own_node in (True, False)]
    full = [chained(*kind) for kind in kinds]
    yield from full
    best = min(range(len(full)), key=lambda i: judge.cost_us(full[i]))
    # Fewer replicas cost less; and a target that can be reached is better than one that cannot.
    expensive = judge.price_us(full[best]) > _CHEAP * judge.plain_us(full[best])
    reached = balanced_max_load(load_E[None], full[best].hosts)[0][0] / mean
    yield from (chained(*kinds[best], target) for target in _TARGETS if expensive or target < reached)
    if not fixed_homes:
        yield eplb_shaped(problem)
        parts = (1.0, *_PARTS) if expensive else (1.0,)
        yield from (packed_replicas(load_E, ranks=ranks, replicas=int(replicas * part), per_rank=per_rank) for part in parts)


def without_unpaid(judge: _Judge, solution: Solution, budget: Budget) -> Solution:
    """Drops, one by one, replicas whose price is more than they save; those with the fewest tokens first."""
    best, best_us, price_us = solution, judge.cost_us(solution), judge.price_us(solution)
    if price_us < _CHEAP * best_us:
        return best
    load_E, ranks = judge.problem.load, judge.problem.num_ranks
    tokens_EG = balanced_shares(load_E, best.hosts) * load_E[:, None]
    expert, rank = np.nonzero(best.hosts & (np.arange(ranks) != best.home_rank[:, None]))
    for i in np.argsort(tokens_EG[expert, rank], kind="stable")[: budget.iterations(_DROPS)]:
        if budget.over():
            break
        tried = Solution(best.home_rank, best.hosts.copy())
        tried.hosts[expert[i], rank[i]] = False
        tried_price_us = judge.price_us(tried)
        if tried_price_us < price_us and (tried_us := judge.cost_us(tried)) < best_us:
            best, best_us, price_us = tried, tried_us, tried_price_us
    return best
