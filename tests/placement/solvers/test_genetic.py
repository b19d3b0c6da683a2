import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.solvers.baselines import contiguous_homes
from megatron_scalemoe.placement.solvers.genetic import (
    homes_of_slots,
    order_based_crossover,
    paper_fitness,
    solve_genetic,
    solve_genetic_paper,
)
from tests.placement.search_cases import assert_balanced, clustered_problem, uneven_ports


@settings(deadline=None)
@given(st.integers(0, 10_000))
def test_a_child_keeps_some_of_the_mothers_genes_and_takes_the_fathers_order_for_the_others(seed):
    rng = np.random.default_rng(seed)
    mother, father = rng.permutation(12), rng.permutation(12)
    child = order_based_crossover(mother, father, np.random.default_rng(seed))
    free = np.random.default_rng(seed).random(12) < 0.5
    assert sorted(child) == list(range(12))
    assert np.array_equal(child[~free], mother[~free])
    assert child[free].tolist() == [gene for gene in father if gene in set(mother[free])]


def test_slots_and_homes_say_the_same():
    assert homes_of_slots(np.array([2, 0, 3, 1]), np.array([0, 0, 1, 1])).tolist() == [0, 1, 0, 1]


def test_the_papers_fitness_is_its_formula():
    problem = clustered_problem(1, ports=uneven_ports(), experts=16)
    home_E, counts, ports = contiguous_homes(problem), problem.traffic.counts, problem.ports
    expected = 0.0
    for i in range(8):
        tokens = counts[i].sum() / 2
        for j in range(8):
            if i != j:
                covered = sum(counts[i, e] for e in range(16) if home_E[e] == j)
                near = ports.node_of_rank[i] == ports.node_of_rank[j]
                far_caps = [ports.out.scale_out_GBps[i], ports.into.scale_out_GBps[j]]
                far_caps += [ports.out.node_GBps[ports.node_of_rank[i]], ports.into.node_GBps[ports.node_of_rank[j]]]
                caps = [ports.out.scale_up_GBps[i], ports.into.scale_up_GBps[j]] if near else far_caps
                assert ports.pair_GBps()[i, j] == min(caps)
                expected += (tokens - covered) * problem.cost.row_bytes / min(caps) / 1e3
    assert paper_fitness(problem, home_E) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("solve", "fitness"), [(solve_genetic, home_cost_us), (solve_genetic_paper, paper_fitness)])
def test_each_fitness_falls_and_a_seed_repeats(solve, fitness):
    problem, values = clustered_problem(2, nodes=2, ranks_per_node=2, experts=16, tokens=500), []
    home_E = solve(problem, rng=np.random.default_rng(1), budget=Budget(), progress=values.append)
    assert_balanced(problem, home_E)
    assert values == sorted(values, reverse=True)
    assert fitness(problem, home_E) == pytest.approx(values[-1], rel=1e-12)
    assert fitness(problem, home_E) < 0.97 * fitness(problem, contiguous_homes(problem))
    assert np.array_equal(home_E, solve(problem, rng=np.random.default_rng(1), budget=Budget()))


def test_a_passed_deadline_still_gives_a_placement_not_worse_than_contiguous():
    problem = clustered_problem(3)
    home_E = solve_genetic(problem, rng=np.random.default_rng(0), budget=Budget(deadline=time.monotonic() - 1))
    assert_balanced(problem, home_E)
    assert home_cost_us(problem, home_E) <= home_cost_us(problem, contiguous_homes(problem))
