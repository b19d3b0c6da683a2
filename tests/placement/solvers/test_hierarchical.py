import math

import numpy as np
import pytest

from megatron_scalemoe.placement.solvers.hierarchical import hierarchical_homes, solve_hierarchical
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from tests.placement.search_cases import assert_balanced, clustered_problem, uneven_ports


def solved(problem):
    return solve_hierarchical(problem, rng=np.random.default_rng(0), deadline=math.inf)


@pytest.mark.parametrize("replicas", [0, 2, 4, 8, 16, 24])
@pytest.mark.parametrize("ports", [None, uneven_ports()])
def test_the_solution_is_a_valid_plan_with_nearly_all_its_replicas(replicas, ports):
    problem = clustered_problem(1, nodes=2, ranks_per_node=4, ports=ports, replicas=replicas)
    solution = solved(problem)
    assert_balanced(problem, solution.home_rank)
    slots = problem.replica_slots_per_rank
    plan = PlacementPlan.from_hosts(solution.home_rank[None], solution.hosts[None], replica_slots_per_rank=slots)
    assert replicas * 0.5 <= plan.num_replicas[0] <= replicas


def test_replicas_stay_in_the_node_of_their_expert():
    problem = clustered_problem(2, nodes=2, ranks_per_node=4, replicas=16)
    solution = solved(problem)
    nodes_of_hosts = [set(problem.ports.node_of_rank[ranks]) for ranks in solution.hosts]
    assert all(len(nodes) == 1 for nodes in nodes_of_hosts)


def test_replicas_even_out_a_hot_expert():
    problem = clustered_problem(3, experts=16, replicas=8)
    problem.traffic.counts[:, 0] = problem.traffic.counts.sum() / 16  # one expert with half of all tokens
    solution = solved(problem)
    per_copy_E = problem.load / solution.hosts.sum(axis=1)
    with_replicas = (per_copy_E[:, None] * solution.hosts).sum(axis=0)
    without = np.bincount(hierarchical_homes(problem, rng=np.random.default_rng(0), deadline=math.inf), problem.load)
    assert with_replicas.max() < 0.5 * without.max()
    assert solution.hosts[0].sum() > solution.hosts[1:].sum(axis=1).max()


def test_homes_alone_are_packed_by_load():
    problem = clustered_problem(4, nodes=2, ranks_per_node=4)
    loads = np.bincount(solved(problem).home_rank, problem.load)
    assert loads.max() / loads.mean() < 1.1 < np.bincount(np.repeat(np.arange(8), 8), problem.load).max() / loads.mean()
