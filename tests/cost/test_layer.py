import dataclasses

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.layer import LayerCost, tokens_cost, whole_counts
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan
from megatron_scalemoe.topology.graph import Override
from megatron_scalemoe.topology.ports import ports_of, two_level_ports
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.traffic.matrices import rows_between_ranks
from megatron_scalemoe.traffic.trace import LayerTraffic, RoutingTrace
from tests.cost.cluster import equal_nodes, star_cluster
from tests.placement.tiny import routed_layer

COST = CostModel(hidden_size=512, ffn_hidden_size=128, exchange_overhead_us=3.0, gpu_TFLOPs=1.0)


def tokens_to_homes(traffic: LayerTraffic, slots_P: np.ndarray) -> np.ndarray:
    return np.where(slots_P >= 0, traffic.counts[:, slots_P], 0).astype(np.int64)


def cost_of(topology, traffic, slots_P, cost=COST) -> LayerCost:
    return tokens_cost(tokens_to_homes(traffic, slots_P), slots_P, traffic, Links(topology), cost)


def exchange_us_pair_by_pair(bytes_GG, topology, cost) -> float:
    """Each pair's bytes added to the links of its one path."""
    load, latency_us = dict.fromkeys(topology.links, 0.0), 0.0
    for i, source in enumerate(topology.ranks):
        for j, target in enumerate(topology.ranks):
            if i == j or not bytes_GG[i, j]:
                continue
            hops = list(nx.utils.pairwise(nx.shortest_path(topology.graph, source, target)))
            latency_us = max(latency_us, sum(topology.graph.edges[hop]["latency_us"] for hop in hops))
            for hop in hops:
                load[hop] += bytes_GG[i, j]
    return max(load[k] / topology.graph.edges[k]["bandwidth_GBps"] / 1e3 for k in load) + latency_us + cost.exchange_overhead_us


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 3))
def test_flat_exchange_without_deduplication_is_that_of_adding_up_pair_by_pair(seed, nodes, per_node):
    rng = np.random.default_rng(seed)
    topology = star_cluster(equal_nodes(nodes, per_node), seed=seed)
    ranks = topology.num_ranks
    traffic, slots = routed_layer(rng, ranks, 2 * ranks, 2), rng.permutation(2 * ranks)
    cost = COST.replaced(deduplicate=False)
    bytes_GG = traffic.counts[:, slots].reshape(ranks, ranks, 2).sum(axis=2) * cost.row_bytes
    result = cost_of(topology, traffic, slots, cost)
    assert result.dispatch_us == pytest.approx(2 * exchange_us_pair_by_pair(bytes_GG, topology, cost))
    assert result.combine_us == pytest.approx(2 * exchange_us_pair_by_pair(bytes_GG.T, topology, cost))
    outside = topology.node_of_rank[:, None] != topology.node_of_rank
    assert result.bytes_scale_out == pytest.approx(4 * bytes_GG[outside].sum())
    assert result.bytes_scale_out + result.bytes_scale_up == pytest.approx(4 * (bytes_GG.sum() - np.trace(bytes_GG)))
    assert result.compute_us == pytest.approx(result.load_G.max() * cost.compute_us_per_row)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["flat", "1dh", "2dh"]), st.booleans())
def test_relabelling_ranks_together_with_the_topology_changes_no_cost(seed, exchange, deduplicate):
    rng = np.random.default_rng(seed)
    gpus = equal_nodes(3, 2)
    order = rng.permutation(6)
    if exchange != "flat":  # leaders and local numbers follow the ranks' order within a node: that one is kept
        machine = np.array([machine for machine, _ in gpus])[order]
        for node in range(3):
            order[machine == node] = np.sort(order[machine == node])
    traffic, slots = routed_layer(rng, 6, 12, 2), np.append(rng.permutation(12), np.full(6, EMPTY)).reshape(3, 6).T.reshape(-1)
    relabelled = dataclasses.replace(traffic, counts=traffic.counts[order])
    cost = COST.replaced(exchange=exchange, deduplicate=deduplicate)
    before = cost_of(star_cluster(gpus, seed=seed), traffic, slots, cost)
    after = cost_of(star_cluster([gpus[i] for i in order], seed=seed), relabelled, slots.reshape(6, 3)[order].reshape(-1), cost)
    for field in dataclasses.fields(LayerCost):
        a, b = getattr(before, field.name), getattr(after, field.name)
        a, b = (a[order], b) if field.name == "load_G" else (np.sort(a), np.sort(b)) if field.name == "busy_us_X" else (a, b)
        np.testing.assert_allclose(a, b, rtol=1e-12, err_msg=field.name)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 3))
def test_links_never_take_less_time_than_ports(seed, nodes, per_node):
    rng = np.random.default_rng(seed)
    topology = star_cluster(equal_nodes(nodes, per_node), seed=seed)
    ranks, routes = topology.num_ranks, compute_routes(topology)
    traffic, slots = routed_layer(rng, ranks, 2 * ranks, 2), rng.permutation(2 * ranks)
    rows_GG = rows_between_ranks(tokens_to_homes(traffic, slots), slots, ranks, traffic)
    ports = ports_of(topology, routes)
    result = cost_of(topology, traffic, slots)
    for at_links_us, bytes_GG in ((result.dispatch_us, rows_GG * COST.row_bytes), (result.combine_us, rows_GG.T * COST.row_bytes)):
        assert at_links_us >= 2 * (ports.busy_us(bytes_GG).max() + COST.exchange_overhead_us)


def test_deduplicated_2dh_sends_fewer_bytes_between_nodes_than_flat_and_flat_fewer_than_selections():
    rng = np.random.default_rng(1)
    topology = star_cluster(equal_nodes(2, 4))
    traffic, slots = routed_layer(rng, 8, 16, 6), np.arange(16)
    sent = {
        (exchange, deduplicate): cost_of(
            topology, traffic, slots, COST.replaced(exchange=exchange, deduplicate=deduplicate)
        ).bytes_scale_out
        for exchange in ("flat", "2dh")
        for deduplicate in (True, False)
    }
    assert sent["2dh", True] < 0.5 * sent["flat", True] < 0.5 * sent["flat", False]
    assert sent["2dh", False] == pytest.approx(sent["flat", False])


def test_a_node_throttled_to_half_doubles_the_time_of_its_links():
    traffic, slots = routed_layer(np.random.default_rng(2), 4, 8, 2), np.arange(8)
    topology = star_cluster(equal_nodes(2, 2))
    throttled = topology.overridden(Override("node1", scale=0.5))
    before, after = cost_of(topology, traffic, slots).busy_us_X, cost_of(throttled, traffic, slots).busy_us_X
    leaves_node = np.array([("fabric" in link) and any("nic1." in name for name in link) for link in topology.links])
    np.testing.assert_allclose(after, np.where(leaves_node, 2 * before, before))


def test_overlap_hides_the_shorter_part():
    traffic, slots = routed_layer(np.random.default_rng(3), 4, 8, 2), np.arange(8)
    topology = star_cluster(equal_nodes(2, 2))
    apart = cost_of(topology, traffic, slots)
    hidden = cost_of(topology, traffic, slots, COST.replaced(overlap=1.0))
    assert hidden.total_us == pytest.approx(max(apart.dispatch_us + apart.combine_us, apart.compute_us))
    assert apart.total_us == pytest.approx(apart.dispatch_us + apart.combine_us + apart.compute_us)


@pytest.mark.parametrize(("exchange", "phases"), [("flat", 1), ("1dh", 3), ("2dh", 2)])
def test_no_tokens_cost_only_the_overhead_of_each_phase(exchange, phases):
    traffic = LayerTraffic(np.zeros((4, 8)), None, np.zeros((1, 8)), 2)
    result = cost_of(star_cluster(equal_nodes(2, 2)), traffic, np.arange(8), COST.replaced(exchange=exchange))
    assert (result.max_over_mean, result.compute_us, result.bytes_scale_out) == (1.0, 0.0, 0.0)
    assert result.total_us == 4 * phases * COST.exchange_overhead_us


def test_the_price_of_replicas_at_links_is_that_at_ports_where_ports_are_all_that_limits():
    topology = star_cluster(equal_nodes(2, 3), scale_out_GBps=50.0)
    rng = np.random.default_rng(4)
    home_rank = np.repeat(np.arange(6), 2)
    hosts = (home_rank[:, None] == np.arange(6)) | (rng.random((12, 6)) < 0.2)
    ports = two_level_ports(2, 3, scale_up_GBps=400.0, scale_out_GBps=50.0)
    at_links = replica_us(home_rank, hosts, COST, Links(topology))
    assert at_links > 0
    assert at_links == pytest.approx(replica_us(home_rank, hosts, COST, ports))


def test_the_price_of_replicas_is_the_way_out_and_the_way_back_over_the_links():
    topology = star_cluster(equal_nodes(2, 2), seed=6)
    hosts = np.eye(4, dtype=bool)
    hosts[0, 3] = True
    there, back = (nx.shortest_path(topology.graph, *ends) for ends in (topology.ranks[::3], topology.ranks[::-3]))
    slowest = [min(topology.graph.edges[hop]["bandwidth_GBps"] for hop in nx.utils.pairwise(path)) for path in (there, back)]
    expected = sum(COST.expert_bytes / GBps / 1e3 for GBps in slowest)
    assert slowest[0] != slowest[1]
    assert replica_us(np.arange(4), hosts, COST, Links(topology)) == pytest.approx(expected)


@pytest.mark.parametrize("exchange", ["flat", "1dh", "2dh"])
def test_the_fabrics_links_carry_the_bytes_between_nodes_of_all_phases(exchange):
    topology = star_cluster(equal_nodes(2, 3), seed=7)
    result = cost_of(topology, routed_layer(np.random.default_rng(8), 6, 12, 2), np.arange(12), COST.replaced(exchange=exchange))
    into_fabric = np.array([target == "fabric" for _, target in topology.links])
    assert (result.busy_us_X * topology.bandwidth_GBps * 1e3)[into_fabric].sum() == pytest.approx(result.bytes_scale_out)
    up = np.array([source.startswith("gpu") and target.startswith("switch") for source, target in topology.links])
    assert (result.busy_us_X * topology.bandwidth_GBps * 1e3)[up].sum() == pytest.approx(result.bytes_scale_up)


def test_plan_cost_splits_the_traffic_over_copies_and_adds_their_price():
    trace = RoutingTrace(np.array([[[[40, 0], [40, 0]]]]))
    links = Links(star_cluster(equal_nodes(1, 2)))
    plan = PlacementPlan(np.array([[0, EMPTY, 1, 0]]), 2, 2)
    [with_replica] = plan_cost(plan, trace, links, COST).layers
    [without] = plan_cost(PlacementPlan.contiguous(1, 2, 2), trace, links, COST).layers
    np.testing.assert_array_equal(with_replica.load_G, [40, 40])
    np.testing.assert_array_equal(without.load_G, [80, 0])
    assert (with_replica.max_over_mean, without.max_over_mean) == (1.0, 2.0)
    price_us = 2 * COST.expert_bytes / 400e3
    assert (with_replica.replica_us, without.replica_us) == (pytest.approx(price_us), 0.0)
    assert with_replica.total_us == pytest.approx(with_replica.compute_us + 4 * COST.exchange_overhead_us + price_us)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 9))
def test_whole_counts_keep_each_ranks_total_and_move_no_count_by_one_or_more(seed, ranks, experts):
    counts = np.random.default_rng(seed).uniform(0, 3, (ranks, experts))
    whole = whole_counts(counts)
    assert whole.dtype == np.int64 and (np.abs(whole - counts) < 1).all()
    np.testing.assert_allclose(whole.sum(axis=1), np.rint(counts.sum(axis=1)))


def test_whole_counts_round_the_largest_fractions_up_and_leave_integers_alone():
    counts = np.array([[0.4, 1.9, 0.7, 0.0], [4.0, 0.0, 2.0, 1.0]])
    np.testing.assert_array_equal(whole_counts(counts), [[0, 2, 1, 0], [4, 0, 2, 1]])
