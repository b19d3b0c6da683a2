import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.baselines import solve_contiguous, solve_greedy, solve_random
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.trace import LayerTraffic
from tests.placement.search_cases import assert_balanced, clustered_problem


def solved(solver, problem, seed=0):
    return solver(problem, rng=np.random.default_rng(seed), budget=Budget())


def problem_of_loads(load_E, ranks):
    counts = np.tile(np.asarray(load_E, dtype=float) / ranks, (ranks, 1))
    traffic = LayerTraffic(counts, None, counts.sum(axis=0)[None], 1)
    return LayerProblem(traffic=traffic, ports=two_level_ports(1, ranks), cost=clustered_problem(0).cost)


@pytest.mark.parametrize("solver", [solve_contiguous, solve_random, solve_greedy])
def test_baselines_give_every_rank_its_share_of_homes_and_repeat_for_a_seed(solver):
    problem = clustered_problem(1)
    home_E = solved(solver, problem)
    assert_balanced(problem, home_E)
    assert np.array_equal(home_E, solved(solver, problem))


def test_contiguous_is_megatrons_own_placement():
    assert solved(solve_contiguous, clustered_problem(1, experts=16)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


def test_greedy_puts_the_heaviest_first_on_the_lightest_rank_with_room():
    # 9 and 8 apart, 7 joins 8, then 6 joins 9: both ranks are full of two.
    home_E = solved(solve_greedy, problem_of_loads([9, 8, 7, 6], 2))
    assert home_E[0] == home_E[3] != home_E[1] == home_E[2]


@given(st.lists(st.integers(0, 50), min_size=6, max_size=6))
@settings(max_examples=30, deadline=None)
def test_greedy_finds_the_best_balance_of_two_experts_a_rank(loads):
    home_E = solved(solve_greedy, problem_of_loads(loads, 3))
    pairs = itertools.permutations(range(6))
    best = min(max(loads[p[0]] + loads[p[1]], loads[p[2]] + loads[p[3]], loads[p[4]] + loads[p[5]]) for p in pairs)
    assert np.bincount(home_E, loads, 3).max() == best


def test_greedy_breaks_ties_towards_the_rank_that_receives_least():
    # Two experts of equal load, each wanted by one rank only: each goes to that rank, and nothing travels.
    counts = np.array([[0.0, 10.0], [10.0, 0.0]])
    traffic = LayerTraffic(counts, None, counts.sum(axis=0)[None], 1)
    problem = LayerProblem(traffic=traffic, ports=two_level_ports(2, 1), cost=clustered_problem(0).cost)
    assert solved(solve_greedy, problem).tolist() == [1, 0]
