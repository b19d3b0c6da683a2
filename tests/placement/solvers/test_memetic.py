import math
import time

import numpy as np
import pytest

from megatron_scalemoe.placement.bound import lower_bound_us
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes, solve_greedy
from megatron_scalemoe.placement.solvers.clustering import solve_clustering
from megatron_scalemoe.placement.solvers.genetic import solve_genetic
from megatron_scalemoe.placement.solvers.hierarchical import hierarchical_homes
from megatron_scalemoe.placement.solvers.memetic import solve_memetic
from tests.placement.search_cases import assert_balanced, clustered_problem


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("coactivation", [True, False])
def test_it_beats_its_starts_and_the_plain_genetic_algorithm_in_the_same_time(seed, coactivation):
    problem = clustered_problem(seed, nodes=2, ranks_per_node=4, coactivation=coactivation)

    def cost_us(solver):
        return home_cost_us(problem, solver(problem, rng=np.random.default_rng(seed), deadline=time.monotonic() + 0.5))

    found = cost_us(solve_memetic)
    assert all(found < cost_us(solver) for solver in (solve_greedy, hierarchical_homes, solve_genetic))
    assert found <= cost_us(solve_clustering)


def test_traffic_without_deduplication_ends_close_to_the_proven_bound():
    problem = clustered_problem(1, topk=1, tokens=40_000)
    home_E = solve_memetic(problem, rng=np.random.default_rng(0), deadline=time.monotonic() + 5)
    assert home_cost_us(problem, home_E) <= 1.01 * lower_bound_us(problem)


def test_it_repeats_for_a_seed_and_reports_falling_costs():
    problem, costs = clustered_problem(3, experts=16, ranks_per_node=4), []
    home_E = solve_memetic(problem, rng=np.random.default_rng(1), deadline=math.inf, progress=costs.append)
    assert_balanced(problem, home_E)
    assert np.array_equal(home_E, solve_memetic(problem, rng=np.random.default_rng(1), deadline=math.inf))
    assert costs == sorted(set(costs), reverse=True)
    assert costs[-1] == pytest.approx(home_cost_us(problem, home_E) - 4 * problem.ports.scale_up_latency_us)


def test_a_passed_deadline_still_gives_the_best_start():
    problem = clustered_problem(4)
    home_E = solve_memetic(problem, rng=np.random.default_rng(0), deadline=time.monotonic() - 1)
    starts = (contiguous_homes(problem), hierarchical_homes(problem, rng=np.random.default_rng(0), deadline=0))
    assert home_cost_us(problem, home_E) <= min(home_cost_us(problem, start) for start in starts)


def test_experts_without_tokens_and_a_single_rank_are_no_special_cases():
    problem = clustered_problem(5, experts=16)
    problem.traffic.counts[:] = 0.0
    problem.traffic.coactivation[:] = 0.0
    assert_balanced(problem, solve_memetic(problem, rng=np.random.default_rng(0), deadline=math.inf))
    alone = clustered_problem(6, ranks_per_node=1, experts=4)
    assert solve_memetic(alone, rng=np.random.default_rng(0), deadline=math.inf).tolist() == [0, 0, 0, 0]
