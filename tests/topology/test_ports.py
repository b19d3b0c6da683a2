"""`ports_of`: never slower than the links, and as slow where the fabric does not block."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.graph import Override, Topology
from megatron_scalemoe.topology.ports import Ports, ports_of, two_level_ports
from megatron_scalemoe.topology.routes import Routes, compute_routes
from tests.topology.small import SMALL, random_topology

ROUTED = {name: (topology, routes := compute_routes(topology), ports_of(topology, routes)) for name, topology in SMALL.items()}


def link_time_us(bytes_GG: np.ndarray, topology: Topology, routes: Routes) -> float:
    return float((routes.link_load(bytes_GG) / topology.bandwidth_GBps).max() / 1e3)


def random_traffic(rng: np.random.Generator, ranks: int) -> np.ndarray:
    """Dense, sparse, to one rank, or from one rank: the last two find a port that is too small."""
    bytes_GG = rng.exponential(1e6, (ranks, ranks)) * (rng.random((ranks, ranks)) < rng.choice([0.05, 0.3, 1]))
    kind, rank = rng.integers(4), rng.integers(ranks)
    keep = np.ones((ranks, ranks), dtype=bool)
    if kind == 1:
        keep = np.tile(np.arange(ranks) == rank, (ranks, 1))
    elif kind == 2:
        keep = np.tile(np.arange(ranks)[:, None] == rank, (1, ranks))
    return bytes_GG * keep


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(SMALL)), st.integers(0, 2**32 - 1))
def test_ports_of_every_builder_never_take_longer_than_the_links(name, seed):
    topology, routes, ports = ROUTED[name]
    bytes_GG = random_traffic(np.random.default_rng(seed), topology.num_ranks)
    assert ports.busy_us(bytes_GG).max() <= link_time_us(bytes_GG, topology, routes) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_ports_of_random_topologies_never_take_longer_than_the_links(seed):
    topology = random_topology(seed)
    routes = compute_routes(topology)
    bytes_GG = random_traffic(np.random.default_rng(seed), topology.num_ranks)
    assert ports_of(topology, routes).busy_us(bytes_GG).max() <= link_time_us(bytes_GG, topology, routes) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["dgx_a100", "dgx_h100", "nvl72", "rail_optimized", "p4d", "throttled"])
def test_ports_of_a_fabric_that_does_not_block_are_as_slow_as_its_links(name):
    topology, routes, ports = ROUTED[name]
    ranks = topology.num_ranks
    same_node_GG = topology.node_of_rank[:, None] == topology.node_of_rank
    for traffic in (np.ones((ranks, ranks)), same_node_GG.astype(float), np.random.default_rng(0).exponential(1e6, (ranks, ranks))):
        assert ports.busy_us(traffic).max() == pytest.approx(link_time_us(traffic, topology, routes), rel=1e-9)


def port_figures(ports: Ports) -> list[list[float]]:
    return [array.tolist() for array in (ports.node_of_rank, *ports.into, *ports.out)]


def test_a_rail_optimised_cluster_has_the_ports_that_two_level_ports_describes():
    topology = BUILDERS["rail_optimized"](nodes=3, gpus_per_node=4)
    found = ports_of(topology, compute_routes(topology))
    assert port_figures(found) == port_figures(two_level_ports(3, 4))
    assert (found.scale_up_latency_us, found.scale_out_latency_us) == (1.0, 3.2)


def test_a_throttled_node_has_half_the_ports():
    _, _, ports = ROUTED["throttled"]
    assert ports.into.node_GBps.tolist() == ports.out.node_GBps.tolist()
    assert ports.into.node_GBps.tolist() == [103, 150, 150, 75, 150]
    assert ports.into.scale_out_GBps[[0, 1, 9, 10]].tolist() == [50, 3, 25, 25]
    assert ports.into.scale_up_GBps[:3].tolist() == [450, 3, 450]


def test_a_shared_nic_limits_the_node_and_each_of_its_ranks():
    topology = SMALL["p4d"].overridden(Override("node1/nic0->ethernet", scale=0.5))
    ports = ports_of(topology, compute_routes(topology))
    assert ports.out.node_GBps.tolist() == [12.5, 6.25, 12.5]
    assert ports.into.node_GBps.tolist() == [12.5, 12.5, 12.5]
    assert ports.out.scale_out_GBps[8:16].tolist() == [6.25] * 8


def test_ports_without_traffic_limit_nothing():
    _, _, ports = ROUTED["dgx_a100"]
    assert np.isinf([*ports.into.scale_out_GBps, *ports.out.scale_out_GBps, *ports.into.node_GBps, *ports.out.node_GBps]).all()
    assert ports.scale_out_latency_us == 0
    single = BUILDERS["fat_tree"](nodes=2, gpus_per_node=1)
    assert np.isinf(ports_of(single, compute_routes(single)).into.scale_up_GBps).all()
    assert ports.busy_us(np.eye(8)).max() == 0


def test_port_time_is_that_of_the_busiest_port():
    ports = two_level_ports(2, 2, scale_up_GBps=100, scale_out_GBps=10)
    bytes_GG = np.zeros((4, 4))
    bytes_GG[0, 1] = 1e6  # scale-up: 1e6 / 100 GB/s = 10 us
    assert ports.busy_us(bytes_GG).max() == pytest.approx(10)
    bytes_GG[0, 2] = 4e5  # scale-out: 4e5 / 10 GB/s = 40 us
    assert ports.busy_us(bytes_GG).max() == pytest.approx(40)
    bytes_GG[1, 3] = bytes_GG[1, 2] = 3e5  # rank 2 receives 7e5
    assert ports.busy_us(bytes_GG).max() == pytest.approx(70)


def test_the_node_port_sums_over_its_ranks():
    ports = ROUTED["p4d"][2]
    bytes_GG = np.zeros((24, 24))
    bytes_GG[:8, 8:16] = np.eye(8) * 1e6  # each rank sends little, the node 8e6 bytes through 12.5 GB/s
    assert ports.busy_us(bytes_GG).max() == pytest.approx(640)


def test_a_subset_counts_its_nodes_anew_and_takes_the_order_it_is_given():
    ports = ROUTED["throttled"][2]
    part = ports.subset([13, 9, 1])
    assert part.node_of_rank.tolist() == [2, 1, 0]
    assert part.node_sizes.tolist() == [1, 1, 1]
    assert part.into.node_GBps.tolist() == [103, 75, 150]
    assert part.out.scale_out_GBps.tolist() == ports.out.scale_out_GBps[[13, 9, 1]].tolist()
    assert part.pair_GBps()[[0, 0, 1], [1, 2, 1]].tolist() == [25, 3, np.inf]
