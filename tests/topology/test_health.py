"""The summary of a topology, and what the check finds in broken ones."""

import dataclasses

import numpy as np
import pytest

from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.graph import Override, Topology
from megatron_scalemoe.topology.health import CHECKS, find_suspicious, node_classes, pair_classes
from megatron_scalemoe.topology.ports import ports_of
from megatron_scalemoe.topology.routes import compute_routes
from tests.topology.small import SMALL


def findings(topology: Topology) -> dict[str, list[str]]:
    """Per check, what was found where."""
    routes = compute_routes(topology)
    found: dict[str, list[str]] = {}
    for finding in find_suspicious(topology, routes, ports_of(topology, routes)):
        found.setdefault(finding.check, []).append(f"{finding.where}: {finding.problem}")
    assert set(found) <= set(CHECKS)
    return found


def changed(topology: Topology, change) -> Topology:
    """A topology whose links went through `change(link) -> link or None`."""
    links = list(topology.full_links)
    return Topology.build("changed", topology.vertices, [new for new in map(change, links) if new])


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_nothing_is_suspicious_about_a_default_cluster(name):
    assert findings(BUILDERS[name]()) == {}


def test_a_throttled_node_is_found_once_per_direction():
    topology = BUILDERS["rail_optimized"]().overridden(Override("node3", scale=0.5))
    assert findings(topology) == {"slow port": ["node 3: node_in 200 GB/s, usual is 400", "node 3: node_out 200 GB/s, usual is 400"]}


def test_a_rank_that_is_slower_than_its_mates_is_found():
    topology = BUILDERS["rail_optimized"]().overridden(Override("node0/nic2->node0/gpu2", bandwidth_GBps=5))
    assert findings(topology) == {
        "symmetric": ["node0/gpu2->node0/nic2: bandwidth_GBps 64 there, 5 back"],
        "slow link": ["node0/nic2->node0/gpu2: 5 GB/s, its kind has 64"],
        "slow port": ["rank 2: scale_out_in 5 GB/s, usual is 50"],
    }


def test_a_link_of_one_direction_is_found():
    topology = changed(SMALL["rail_optimized"], lambda link: None if link[:2] == ("group0/rail0", "spine0") else link)
    assert findings(topology)["symmetric"] == ["spine0->group0/rail0: there is no link back"]


def test_another_latency_on_the_way_back_is_found():
    topology = changed(SMALL["p4d"], lambda link: link._replace(latency_us=9) if link.source == "node1/nic0" else link)
    assert len(findings(topology)["symmetric"]) == 2


def test_unequal_nodes_are_found():
    assert findings(BUILDERS["ring"](gpus=11, gpus_per_node=4))["equal nodes"] == ["node 2: 3 GPUs, usual is 4"]


def test_a_nic_that_no_route_uses_is_found():
    topology = SMALL["p4d"]
    links = list(topology.full_links)
    links += [("node0/host", "node0/nic1", 32, 2), ("node0/nic1", "node0/host", 32, 2)]
    links += [("node0/nic1", "ethernet", 12.5, 4), ("ethernet", "node0/nic1", 12.5, 4)]
    broken = Topology.build("two NICs", [*topology.vertices, ("node0/nic1", "nic", 0)], links)
    assert findings(broken) == {"idle NIC": ["node0/nic1: no route between ranks passes it"]}


def test_pair_classes_count_every_pair_once():
    for topology in SMALL.values():
        routes = compute_routes(topology)
        classes = pair_classes(topology, routes)
        assert sum(row.pairs for row in classes) == topology.num_ranks * (topology.num_ranks - 1)
        for row in classes:
            source, target = row.example
            assert routes.latency_us[source, target] == row.latency_us
            assert (topology.node_of_rank[source] == topology.node_of_rank[target]) == row.same_node
            assert row.bandwidth_GBps[0] <= routes.bandwidth_GBps[source, target] <= row.bandwidth_GBps[1]


def test_pair_classes_of_a_large_cluster_come_from_a_sample():
    topology = BUILDERS["p4d"](nodes=20).overridden(Override("node7", scale=0.5))
    routes = compute_routes(topology)
    inside, between = pair_classes(topology, routes)
    assert (inside.pairs, inside.bandwidth_GBps) == (20 * 56, (300, 300))
    assert (between.pairs, between.bandwidth_GBps) == (160 * 152, (6.25, 12.5))


def test_a_class_that_the_sample_misses_still_gets_its_bandwidth():
    """Of 129 GPUs in a box, only GPUs 1 and 2 have a faster link of their own."""
    box = BUILDERS["nvl72"](gpus_per_rack=129)
    links = list(box.full_links)
    links += [("node0/gpu1", "node0/gpu2", 33, 0.1), ("node0/gpu2", "node0/gpu1", 33, 0.1)]
    topology = Topology.build("bridge", box.vertices, links)
    assert pair_classes(topology, compute_routes(topology))[0][1:4] == (0.1, 2, (33, 33))


def test_equal_nodes_share_a_row():
    topology = BUILDERS["p4d"](nodes=6).overridden(Override("node3", scale=0.5))
    rows = node_classes(ports_of(topology, compute_routes(topology)))
    assert [(row.first, row.last, row.node_GBps) for row in rows] == [(0, 2, 12.5), (3, 3, 6.25), (4, 5, 12.5)]
    assert {row.ranks_per_node for row in rows} == {8}
    only = node_classes(dataclasses.replace(ports_of(SMALL["dgx_a100"], compute_routes(SMALL["dgx_a100"]))))
    assert np.isinf(only[0].node_GBps)
