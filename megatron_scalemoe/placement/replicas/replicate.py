"""Replicas of experts: which, how many and where, so that the per-step split can even out the ranks, and only where they pay.

Suffixes: B loads (cases), G ranks, E logical experts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable

import numpy as np

from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.objective import placement_cost, solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicas.replicate_drift import plausible_loads
from megatron_scalemoe.placement.replicas.replicate_polish import polish
from megatron_scalemoe.placement.replicas.replicate_search import improve
from megatron_scalemoe.placement.replicas.replicate_start import balanced_homes, chained_replicas, packed_beside_homes, packed_replicas
from megatron_scalemoe.placement.solvers.hierarchical import eplb_shaped
from megatron_scalemoe.plan.split import balanced_max_load, balanced_shares

# Loads that a placement is judged by, and rounds of the search: 16 ranks x 32 experts get all, more experts fewer, as each takes longer.
CASES, FEWEST_CASES = 12, 4
DRAWS, FEWEST_DRAWS = 40, 6
_SMALL = 64  # experts + replicas
# Moves that are judged by their full cost, from each of two placements; far fewer for more experts.
TRIALS = 400
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
    deadline: float,
    fixed_homes: bool = False,
    old: Solution | None = None,
) -> Solution:
    """Adds up to `problem.replicas` replicas to the homes (int [E]), and improves both; with `fixed_homes` the homes stay.

    The judge is `solution_cost` of the mean traffic, split as the runtime does, the price of the replicas included, plus what the largest
    rank load grows by over the recorded steps and plausible drift (`replicate_drift`). It picks the best of several constructions
    (`replicate_start`), or no replicas at all; then homes and replicas are improved together, first for balance (`replicate_search`), then
    for cost (`replicate_polish`), and replicas that do not pay are dropped. By this judge the result is never worse than the homes alone.

    old: a placement with these homes, where the search may start as well.
    Deterministic for `rng`, unless `deadline`, a `time.monotonic()` value, cuts it short.
    """
    bare = Solution.without_replicas(np.asarray(home_rank_E, dtype=np.int64), problem.num_ranks)
    if not problem.replicas or not problem.load.any():
        return bare
    effort = min(1.0, _SMALL / (problem.num_experts + problem.replicas)) ** 0.5
    loads_BE, weight_B = plausible_loads(problem.traffic.loads, max(FEWEST_CASES, round(CASES * effort)), rng)
    judge = _judge(problem, bare, loads_BE, weight_B)
    limits = {"replicas": problem.replicas, "per_rank": problem.replica_slots_per_rank, "rng": rng, "deadline": deadline}
    limits["fixed_homes"] = fixed_homes
    draws, trials = max(FEWEST_DRAWS, round(DRAWS * effort)), round(TRIALS * effort**2)
    best_start = _best_start(judge, bare, old, deadline, fixed_homes)
    balanced = improve(best_start, loads_BE, weight_B, judge.cost_us, draws=draws, **limits)
    polished = [balanced]
    packed = _packed(problem, bare)[-1:] if fixed_homes else [eplb_shaped(problem)]
    for start in (balanced, *packed, *([old] if old else [])):
        if time.monotonic() < deadline and judge.cost_us(start) < math.inf:
            polished.append(polish(start, judge.plain_us, judge.cost_us, trials=trials, **limits))
    return _without_unpaid(judge, min(polished, key=judge.cost_us), deadline)


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
        if largest is None:
            largest = float(self.weight_B @ balanced_max_load(self.loads_BE, solution.hosts)[0])
        plain = solution_cost(self.problem, solution)
        if plain.total_us > self.bare_us:
            return math.inf
        return plain.total_us + self.us_per_token * (largest - plain.compute_us / self.problem.cost.compute_us_per_row)

    def plain_us(self, solution: Solution) -> float:
        """Of the mean traffic."""
        return solution_cost(self.problem, solution).total_us

    def price_us(self, solution: Solution) -> float:
        return replica_us(solution.home_rank, solution.hosts, self.problem.cost, self.problem.ports)

    def costs(self, solutions: Iterable[Solution], deadline: float) -> list[tuple[float, Solution]]:
        """Of one solution at least, and of the others until the deadline."""
        judged = []
        for solution in solutions:
            judged.append((self.cost_us(solution), solution))
            if time.monotonic() > deadline:
                break
        return judged


def _judge(problem: LayerProblem, bare: Solution, loads_BE: np.ndarray, weight_B: np.ndarray) -> _Judge:
    bare_us = placement_cost(problem, bare.hosts.astype(np.float64)).total_us
    return _Judge(problem, loads_BE, weight_B, bare_us / float((problem.load @ bare.hosts).max()), bare_us)


def _best_start(judge: _Judge, bare: Solution, old: Solution | None, deadline: float, fixed_homes: bool) -> Solution:
    problem = judge.problem
    load_E = problem.load
    ranks, per_rank, replicas = problem.num_ranks, problem.replica_slots_per_rank, problem.replicas
    mean, node_G = load_E.sum() / ranks, problem.ports.node_of_rank

    def chained(homes_E: np.ndarray, own_node: bool, target: float = 1.0) -> Solution:
        return chained_replicas(load_E, homes_E, node_G, target=target * mean, replicas=replicas, per_rank=per_rank, own_node=own_node)

    def packed(number: int) -> Solution:
        return packed_replicas(load_E, ranks=ranks, replicas=number, per_rank=per_rank)

    starts = judge.costs([bare, *([old] if old else [])], deadline)
    if fixed_homes:
        homes, packed_starts = [bare.home_rank], _packed(problem, bare)
    else:
        homes, packed_starts = [bare.home_rank, balanced_homes(load_E, ranks)], [packed(replicas), eplb_shaped(problem)]
    starts += judge.costs(packed_starts, deadline)
    kinds = [(homes_E, own_node) for homes_E in homes for own_node in (True, False)]
    full = judge.costs((chained(*kind) for kind in kinds), deadline)
    number = min(range(len(full)), key=lambda i: full[i][0])
    full_us, best_full = full[number]
    reached = balanced_max_load(load_E[None], best_full.hosts)[0][0] / mean
    # Fewer replicas cost less; and a target that can be reached is better than one that cannot.
    expensive = judge.price_us(best_full) > _CHEAP * full_us
    targets = [target for target in _TARGETS if expensive or target < reached]
    if time.monotonic() < deadline:
        starts += judge.costs((chained(*kinds[number], target) for target in targets), deadline)
    if expensive and not fixed_homes and time.monotonic() < deadline:
        starts += judge.costs((packed(int(replicas * part)) for part in _PARTS), deadline)
    return min(starts + full, key=lambda start: start[0])[1]


def _packed(problem: LayerProblem, bare: Solution) -> list[Solution]:
    """Replicas beside fixed homes, evenly packed: inside the nodes of their homes, then anywhere."""
    limits = {"replicas": problem.replicas, "per_rank": problem.replica_slots_per_rank}
    node_G = problem.ports.node_of_rank
    return [packed_beside_homes(problem.load, bare.home_rank, node_G, own_node=own_node, **limits) for own_node in (True, False)]


def _without_unpaid(judge: _Judge, solution: Solution, deadline: float) -> Solution:
    """Drops, one by one, replicas whose price is more than they save; those with the fewest tokens first."""
    best, best_us, price_us = solution, judge.cost_us(solution), judge.price_us(solution)
    if price_us < _CHEAP * best_us:
        return best
    load_E, ranks = judge.problem.load, judge.problem.num_ranks
    tokens_EG = balanced_shares(load_E, best.hosts) * load_E[:, None]
    expert, rank = np.nonzero(best.hosts & (np.arange(ranks) != best.home_rank[:, None]))
    for i in np.argsort(tokens_EG[expert, rank], kind="stable")[:_DROPS]:
        if time.monotonic() > deadline:
            break
        tried = Solution(best.home_rank, best.hosts.copy())
        tried.hosts[expert[i], rank[i]] = False
        tried_price_us = judge.price_us(tried)
        if tried_price_us < price_us and (tried_us := judge.cost_us(tried)) < best_us:
            best, best_us, price_us = tried, tried_us, tried_price_us
    return best
