import itertools
import time

import numpy as np
import pytest

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes
from megatron_scalemoe.placement.solvers.local_search import LEAST_GAIN, descend, kick, solve_local_search
from megatron_scalemoe.placement.solvers.port_model import port_model
from megatron_scalemoe.placement.solvers.swap_table import SwapTable
from tests.placement.search_cases import assert_balanced, clustered_problem
from tests.placement.tiny import least_cost_us


def solved(problem, seed=0, **others):
    return solve_local_search(problem, rng=np.random.default_rng(seed), budget=Budget(), **others)


def test_a_descent_ends_where_no_single_swap_is_better():
    problem = clustered_problem(1, nodes=2, ranks_per_node=4)
    table = SwapTable(port_model(problem), contiguous_homes(problem))
    began_us = table.objective_us
    descend(table, 10_000, rng=np.random.default_rng(0), budget=Budget())
    assert table.objective_us < began_us
    e_K, f_K = np.array([(e, f) for e, f in itertools.combinations(range(64), 2) if table.home_rank_E[e] != table.home_rank_E[f]]).T
    assert table.objectives(e_K, f_K).min() >= table.objective_us * (1 - LEAST_GAIN)


def test_many_experts_are_improved_from_samples_of_their_swaps():
    problem = clustered_problem(2, nodes=2, ranks_per_node=8, experts=128, tokens=8000)
    table = SwapTable(port_model(problem), contiguous_homes(problem))
    descend(table, 10_000, rng=np.random.default_rng(0), budget=Budget())
    assert_balanced(problem, table.home_rank_E)
    assert home_cost_us(problem, table.home_rank_E) < 0.75 * home_cost_us(problem, contiguous_homes(problem))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nodes", [1, 3])
def test_small_cases_reach_the_optimum(seed, nodes):
    problem = clustered_problem(seed, nodes=nodes, ranks_per_node=3 // nodes, experts=6, affinity=0.3)
    assert home_cost_us(problem, solved(problem)) == pytest.approx(least_cost_us(problem), rel=1e-9)


def test_it_repeats_for_a_seed_and_reports_falling_costs():
    problem, costs = clustered_problem(3, experts=32), []
    home_E = solved(problem, progress=costs.append)
    assert_balanced(problem, home_E)
    assert np.array_equal(home_E, solved(problem))
    assert max(np.diff(costs)) <= 1e-12 * costs[0]  # a search accepts by its objective: the total may stay, to rounding
    assert costs[-1] == pytest.approx(home_cost_us(problem, home_E) - 4 * problem.ports.scale_up_latency_us)


def test_a_passed_deadline_still_gives_a_placement_no_worse_than_contiguous():
    problem = clustered_problem(4)
    home_E = solve_local_search(problem, rng=np.random.default_rng(0), budget=Budget(deadline=time.monotonic() - 1))
    assert_balanced(problem, home_E)
    assert home_cost_us(problem, home_E) <= home_cost_us(problem, contiguous_homes(problem))


def test_a_kick_moves_a_few_experts_or_exchanges_the_fullest_rank_with_another():
    home_E, load_E = np.repeat(np.arange(8), 8), np.ones(64)
    load_E[20] = 9.0  # rank 2 is the fullest
    kinds = set()
    for seed in range(40):
        kicked_E = kick(home_E, load_E, np.random.default_rng(seed))
        assert np.bincount(kicked_E).tolist() == [8] * 8
        moved = np.flatnonzero(kicked_E != home_E)
        whole = moved.size == 16 and len({*home_E[moved]}) == 2
        assert (whole and 2 in home_E[moved]) or moved.size <= 11
        kinds.add(whole)
    assert kinds == {True, False}


def test_one_rank_and_one_expert_per_rank_are_no_special_cases():
    alone = clustered_problem(5, ranks_per_node=1, experts=4)
    assert solved(alone).tolist() == [0, 0, 0, 0]
    assert_balanced(single := clustered_problem(6, experts=8), solved(single))
