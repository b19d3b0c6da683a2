import dataclasses

import numpy as np
import pytest

from megatron_scalemoe.cost.layer import exchange_us
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.solvers.port_model import port_model
from megatron_scalemoe.placement.solvers.swap_table import SLOPE, SwapTable
from megatron_scalemoe.topology.ports import Ports, PortSide, two_level_ports
from megatron_scalemoe.traffic.matrices import distinct_factor
from tests.placement.search_cases import clustered_problem, uneven_ports


def slow_senders() -> Ports:
    """In one node, out-ports a tenth of the in-ports: what ranks send to each other decides, not what they receive."""
    ports = two_level_ports(1, 8)
    return dataclasses.replace(ports, out=PortSide(*(GBps / 10 for GBps in ports.out)))


PROBLEMS = {
    "one node": clustered_problem(1),
    "two nodes": clustered_problem(2, nodes=2, ranks_per_node=4),
    "a node per rank": clustered_problem(3, nodes=8, ranks_per_node=1),
    "uneven ports": clustered_problem(4, ports=uneven_ports(), affinity=0.6),
    "top-1": clustered_problem(5, nodes=2, ranks_per_node=4, topk=1),
    "top-8": clustered_problem(6, nodes=2, ranks_per_node=4, topk=8),
    "no co-activation": clustered_problem(7, nodes=4, ranks_per_node=2, coactivation=False),
    "every row sent": clustered_problem(8, cost=CostModel(deduplicate=False)),
    "overlap": clustered_problem(9, nodes=2, ranks_per_node=4, cost=CostModel(overlap=0.7, exchange_overhead_us=3.0)),
    "senders matter": clustered_problem(10, ports=slow_senders(), affinity=0.9),
    "two ranks": clustered_problem(11, nodes=2, ranks_per_node=1, experts=8),
}


def slow_objective(problem, home_E):
    """The search objective from the rank x rank bytes, nothing kept."""
    ports, cost, ranks = problem.ports, problem.cost, problem.num_ranks

    def times(home_E):
        share_EG = np.eye(ranks)[home_E]
        factor_G = distinct_factor(share_EG, problem.traffic) if cost.deduplicate else 1.0
        bytes_GG = problem.traffic.counts @ share_EG * factor_G * cost.row_bytes / 1e3
        near = ports.node_of_rank[:, None] == ports.node_of_rank
        up_G = np.where(near & ~np.eye(ranks, dtype=bool), bytes_GG, 0.0).sum(axis=0)
        out_G = np.where(near, 0.0, bytes_GG).sum(axis=0)
        out_N = np.array([out_G[ports.node_of_rank == n].sum() for n in range(ports.num_nodes)])
        receive = np.maximum(up_G / ports.into.scale_up_GBps, out_G / ports.into.scale_out_GBps)
        send = np.maximum(up_G / ports.out.scale_up_GBps, out_G / ports.out.scale_out_GBps)
        compute = problem.load @ share_EG * cost.compute_us_per_row
        return 2 * (receive + send) + compute, 2 * out_N * (1 / ports.into.node_GBps + 1 / ports.out.node_GBps)

    start = times(np.repeat(np.arange(ranks), problem.homes_per_rank))
    slope = SLOPE * sum((t**2).sum() / max(s.sum(), 1e-9) for t, s in zip(times(home_E), start, strict=True))
    return cost_without_latency(problem, home_E) + slope


def cost_without_latency(problem, home_E):
    share_EG, cost, ports = np.eye(problem.num_ranks)[home_E], problem.cost, problem.ports
    factor_G = distinct_factor(share_EG, problem.traffic) if cost.deduplicate else 1.0
    bytes_GG = problem.traffic.counts @ share_EG * factor_G * cost.row_bytes
    far, near = ports.scale_out_latency_us, ports.scale_up_latency_us
    latency = far if ports.num_nodes > 1 else near
    both = sum(2 * (exchange_us([b], ports, cost)[0] - latency) for b in (bytes_GG, bytes_GG.T))
    return cost.layer_us(both, (problem.load @ share_EG).max() * cost.compute_us_per_row)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_swap_is_judged_as_a_full_evaluation_would(name):
    problem, rng = PROBLEMS[name], np.random.default_rng(0)
    home_E = rng.permutation(np.repeat(np.arange(problem.num_ranks), problem.homes_per_rank))
    table = SwapTable(port_model(problem), home_E)
    assert table.objective_us == pytest.approx(slow_objective(problem, home_E), rel=1e-9)
    pairs = rng.integers(problem.num_experts, size=(2, 150))
    e_K, f_K = pairs[:, home_E[pairs[0]] != home_E[pairs[1]]]
    for e, f in zip(e_K, f_K, strict=True):
        swapped_E = home_E.copy()
        swapped_E[[e, f]] = swapped_E[[f, e]]
        assert table.objectives(np.array([e]), np.array([f]))[0] == pytest.approx(slow_objective(problem, swapped_E), rel=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_table_stays_exact_over_many_swaps(name):
    problem, rng = PROBLEMS[name], np.random.default_rng(1)
    table = SwapTable(port_model(problem), np.repeat(np.arange(problem.num_ranks), problem.homes_per_rank))
    for _ in range(200):
        e, f = rng.integers(problem.num_experts, size=2)
        if table.home_rank_E[e] != table.home_rank_E[f]:
            table.swap(e, f)
    assert table.objective_us == pytest.approx(slow_objective(problem, table.home_rank_E), rel=1e-9)
    assert table.total_us == pytest.approx(cost_without_latency(problem, table.home_rank_E), rel=1e-9)
    assert table.total_us <= home_cost_us(problem, table.home_rank_E)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_best_of_many_swaps_is_found_whatever_was_left_out(name):
    problem = PROBLEMS[name]
    home_E = np.random.default_rng(2).permutation(np.repeat(np.arange(problem.num_ranks), problem.homes_per_rank))
    table = SwapTable(port_model(problem), home_E)
    pairs = np.array(np.triu_indices(problem.num_experts, 1))
    pairs = pairs[:, np.random.default_rng(3).permutation(pairs.shape[1])[:400]]
    e_K, f_K = pairs[:, home_E[pairs[0]] != home_E[pairs[1]]]
    one_by_one = np.array([table.objectives(e_K[k : k + 1], f_K[k : k + 1])[0] for k in range(e_K.size)])
    together, below = table.objectives(e_K, f_K), table.objectives(e_K, f_K, table.objective_us)
    assert together.argmin() == one_by_one.argmin()
    assert together.min() == pytest.approx(one_by_one.min(), rel=1e-12)
    if one_by_one.min() < table.objective_us:
        assert below.min() == pytest.approx(one_by_one.min(), rel=1e-12)
    known = np.isfinite(together)
    np.testing.assert_allclose(together[known], one_by_one[known], rtol=1e-12)


def test_the_busiest_ranks_are_those_of_the_fullest_rank_and_the_slowest_port():
    problem = clustered_problem(12, nodes=2, ranks_per_node=4)
    table = SwapTable(port_model(problem), np.repeat(np.arange(8), 8))
    fullest = problem.load.reshape(8, 8).sum(axis=1).argmax()
    assert fullest in table.busiest_ranks()
    assert set(table.busiest_ranks()) < set(range(8))
