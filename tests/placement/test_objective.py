import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.layer import exchange_us
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.objective import home_cost_us, placement_cost, slots_of_hosts, solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import balanced_shares
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.matrices import distinct_factor
from megatron_scalemoe.traffic.trace import LayerTraffic
from tests.placement.search_cases import clustered_problem, uneven_ports


def slow_exchange_us(bytes_GG, ports, overhead_us):
    """Pair by pair, in plain Python."""
    node, ranks = ports.node_of_rank, range(ports.num_ranks)
    load, latency = {}, 0.0
    for i in ranks:
        for j in ranks:
            if i == j or bytes_GG[i, j] == 0:
                continue
            if node[i] == node[j]:
                keys = [("up_out", i, ports.out.scale_up_GBps[i]), ("up_in", j, ports.into.scale_up_GBps[j])]
                latency = max(latency, ports.scale_up_latency_us)
            else:
                keys = [("out_out", i, ports.out.scale_out_GBps[i]), ("out_in", j, ports.into.scale_out_GBps[j])]
                keys += [("node_out", node[i], ports.out.node_GBps[node[i]]), ("node_in", node[j], ports.into.node_GBps[node[j]])]
                latency = max(latency, ports.scale_out_latency_us)
            for key in keys:
                load[key] = load.get(key, 0.0) + bytes_GG[i, j]
    return max((total / key[2] / 1e3 for key, total in load.items()), default=0.0) + latency + overhead_us


@settings(deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 0.9]))
def test_the_exchange_takes_as_long_as_its_busiest_port(seed, silent):
    rng = np.random.default_rng(seed)
    bytes_GG = rng.integers(1, 10**6, (8, 8)) * (rng.random((8, 8)) >= silent)
    took_us = exchange_us([bytes_GG], uneven_ports(), CostModel(exchange_overhead_us=2.0))[0]
    assert took_us == pytest.approx(slow_exchange_us(bytes_GG, uneven_ports(), 2.0), rel=1e-12)


def test_rows_that_stay_on_their_rank_take_no_time_and_no_latency():
    ports = two_level_ports(2, 2)
    assert exchange_us([np.diag([5.0, 6.0, 7.0, 8.0])], ports, CostModel(exchange_overhead_us=3.0))[0] == 3.0
    near = np.zeros((4, 4))
    near[0, 1] = 450e3
    assert exchange_us([near], ports, CostModel())[0] == pytest.approx(1.0 + 1.0)


def test_the_cost_is_twice_each_exchange_and_the_compute_of_the_fullest_rank():
    counts = np.array([[0.0, 100.0], [50.0, 0.0]])  # rank 0 wants expert 1, rank 1 wants expert 0
    traffic = LayerTraffic(counts, None, counts.sum(axis=0)[None], 1)
    cost = CostModel(hidden_size=1000, bytes_per_value=1, exchange_overhead_us=0.5)
    problem = LayerProblem(traffic=traffic, ports=two_level_ports(2, 1, scale_out_GBps=10.0), cost=cost)
    priced = placement_cost(problem, np.eye(2))
    # 100 rows of 1,000 bytes at 10 GB/s are 10 us; 5 us latency and 0.5 us overhead come on top.
    assert priced.dispatch_us == priced.combine_us == pytest.approx(2 * 15.5)
    assert priced.compute_us == pytest.approx(100 * cost.compute_us_per_row)
    assert priced.total_us == pytest.approx(62 + priced.compute_us)
    assert placement_cost(problem, np.eye(2)[::-1]).dispatch_us == pytest.approx(2 * 0.5)


def test_deduplication_and_overlap_make_a_layer_cheaper():
    plain, packed, hidden = (
        home_cost_us(clustered_problem(1, cost=cost), np.repeat(np.arange(8), 8))
        for cost in (CostModel(deduplicate=False), CostModel(), CostModel(overlap=1.0))
    )
    assert hidden < packed < plain


def test_the_combine_goes_the_other_way():
    problem = clustered_problem(2, ports=uneven_ports(), affinity=0.7)
    share_EG = np.eye(8)[np.repeat(np.arange(8), 8)]
    bytes_GG = problem.traffic.counts @ share_EG * distinct_factor(share_EG, problem.traffic) * problem.cost.row_bytes
    priced = placement_cost(problem, share_EG)
    assert priced.dispatch_us == pytest.approx(2 * slow_exchange_us(bytes_GG, uneven_ports(), 0.0), rel=1e-12)
    assert priced.combine_us == pytest.approx(2 * slow_exchange_us(bytes_GG.T, uneven_ports(), 0.0), rel=1e-12)
    assert priced.combine_us != pytest.approx(priced.dispatch_us)


def test_replicas_are_paid_and_near_copies_preferred():
    problem = clustered_problem(3, nodes=2, ranks_per_node=4)
    home_E = np.repeat(np.arange(8), 8)
    hosts_EG = np.eye(8, dtype=bool)[home_E]
    hosts_EG[:] = True
    priced = solution_cost(problem, Solution(home_E, hosts_EG))
    alike = placement_cost(problem, balanced_shares(problem.load, hosts_EG))
    assert alike.replica_us == 0
    assert priced.replica_us == replica_us(home_E, hosts_EG, problem.cost, problem.ports) > 0
    assert priced.compute_us == pytest.approx(alike.compute_us, rel=1e-3)
    assert priced.dispatch_us < 0.2 * alike.dispatch_us


def test_without_replicas_both_costs_are_the_same():
    problem = clustered_problem(5, nodes=2, ranks_per_node=4)
    solution = Solution.without_replicas(np.repeat(np.arange(8), 8), 8)
    cost_us = solution_cost(problem, solution).total_us
    assert cost_us == placement_cost(problem, solution.hosts.astype(float)).total_us
    # Ports know no phases.
    through_leaders = dataclasses.replace(problem, cost=problem.cost.replaced(exchange="1dh"))
    assert solution_cost(through_leaders, solution).total_us == cost_us


@pytest.mark.parametrize("seed", range(2))
def test_slots_of_hosts_hold_each_copy_once(seed):
    hosts_EG = np.random.default_rng(seed).random((12, 4)) < 0.4
    hosts_EG[0, 0] = True
    slots_GS = slots_of_hosts(hosts_EG).reshape(4, -1)
    again_EG = np.array([[(row == expert).sum() for row in slots_GS] for expert in range(12)])
    assert np.array_equal(again_EG, hosts_EG)
    assert (slots_GS != EMPTY).all(axis=1).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_relabelling_ranks_with_their_ports_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    ports, order = uneven_ports(), rng.permutation(8)
    problem = clustered_problem(4, ports=ports, tokens=500)
    share_EG = rng.dirichlet(np.ones(8), size=64)
    traffic = problem.traffic
    moved_traffic = LayerTraffic(traffic.counts[order], traffic.coactivation, traffic.loads, traffic.topk)
    moved = LayerProblem(traffic=moved_traffic, ports=ports.subset(order), cost=problem.cost)
    assert placement_cost(moved, share_EG[:, order]).total_us == pytest.approx(placement_cost(problem, share_EG).total_us, rel=1e-12)
