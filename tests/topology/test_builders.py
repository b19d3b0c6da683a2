"""Builders: shapes and figures, and what they say about bad parameters."""

import networkx as nx
import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS, build_topology
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import compute_routes
from tests.topology.small import PARAMETERS, SMALL


def bandwidths(topology: Topology, source: str, target: str) -> list[float]:
    """Of the links from vertices whose names end with (or, for a whole name, are) the first, to the second."""
    found = zip(topology.links, topology.bandwidth_GBps, strict=True)
    return [float(b) for (u, v), b in found if source in u and target in v]


def test_every_builder_is_tested():
    assert set(PARAMETERS) == set(BUILDERS)


@pytest.mark.parametrize("name", BUILDERS)
def test_defaults_build_and_are_recorded(name):
    topology = BUILDERS[name]()
    assert (topology.name, topology.builder) == (name, name)
    assert build_topology(name, topology.parameters).content_hash == topology.content_hash
    assert np.isfinite(compute_routes(topology).latency_us).all()


@pytest.mark.parametrize(
    ("name", "parameters", "ranks", "nodes"),
    [
        ("dgx_h100", {}, 8, 1),
        ("nvl72", {}, 72, 1),
        ("rail_optimized", {"nodes": 5, "gpus_per_node": 3}, 15, 5),
        ("fat_tree", {"nodes": 9}, 72, 9),
        ("dragonfly", {"groups": 3, "routers_per_group": 2, "nodes_per_router": 2}, 48, 12),
        ("torus", {"dims": (2, 3, 4)}, 24, 6),
        ("ring", {"gpus": 10, "gpus_per_node": 4}, 10, 3),
        ("pcie_box", {"gpu": "2080ti", "nodes": 8}, 32, 8),
        ("p4d", {}, 32, 4),
    ],
)
def test_numbers_of_ranks_and_nodes(name, parameters, ranks, nodes):
    topology = BUILDERS[name](**parameters)
    assert (topology.num_ranks, topology.num_nodes) == (ranks, nodes)
    assert topology.ranks[0] == "node0/gpu0"
    assert (np.diff(topology.node_of_rank) >= 0).all()


@pytest.mark.parametrize("fabric", ["rail_optimized", "fat_tree"])
def test_uplinks_of_a_leaf_carry_its_nics_divided_by_the_oversubscription(fabric):
    for oversubscription in (1.0, 4.0):
        topology = BUILDERS[fabric](nodes=4, gpus_per_node=2, nodes_per_leaf=2, spines=3, oversubscription=oversubscription)
        leaves = {u for u, v in topology.links if v == "spine0"}
        assert len(leaves) == {"rail_optimized": 4, "fat_tree": 2}[fabric]
        for leaf in leaves:
            assert sum(bandwidths(topology, "nic", leaf)) / sum(bandwidths(topology, leaf, "spine")) == pytest.approx(oversubscription)


def test_rails_meet_without_the_spine():
    topology = SMALL["rail_optimized"]
    routes = compute_routes(topology)
    spine = [i for i, link in enumerate(topology.links) if "spine" in link[1]]
    traffic = np.zeros((15, 15))
    traffic[0, 3] = 1  # GPU 0 of node 0 to GPU 0 of node 1, on one leaf
    assert not routes.link_load(traffic)[spine].any()
    traffic[0, 4] = 1  # another rail
    assert routes.link_load(traffic)[spine].sum() == pytest.approx(1)


@pytest.mark.parametrize("dims", [(4, 4), (2, 3), (3, 3, 3), (2, 2, 2), (2, 4, 5)])
def test_a_torus_is_networkx_grid_graph(dims):
    assert nx.is_isomorphic(nx.Graph(BUILDERS["torus"](dims=dims).graph), nx.Graph(nx.grid_graph(dims, periodic=True)))


def test_a_torus_distance_is_the_sum_over_its_axes():
    latency_GG = compute_routes(BUILDERS["torus"](dims=(4, 6))).latency_us
    places = np.array(np.unravel_index(np.arange(24), (4, 6)))
    steps = np.abs(places[:, :, None] - places[:, None])
    expected = np.minimum(steps, np.array([4, 6])[:, None, None] - steps).sum(axis=0)
    np.testing.assert_allclose(latency_GG, expected)


@pytest.mark.parametrize(("groups", "routers"), [(2, 1), (4, 4), (5, 2), (7, 3)])
def test_dragonfly_groups_are_linked_pair_by_pair(groups, routers):
    topology = BUILDERS["dragonfly"](groups=groups, routers_per_group=routers)
    between = [
        (u.split("/")[0], v.split("/")[0]) for u, v in topology.links if u[:5] == v[:5] == "group" and u.split("/")[0] != v.split("/")[0]
    ]
    assert len(between) == len(set(between)) == groups * (groups - 1)
    per_router = [
        sum(u == f"group0/router{r}" and v[:6] in {f"group{g}" for g in range(1, groups)} for u, v in topology.links)
        for r in range(routers)
    ]
    assert max(per_router) - min(per_router) <= 1


def test_paper_clusters_have_the_papers_figures():
    p4d = BUILDERS["p4d"]()
    assert set(bandwidths(p4d, "nic0", "ethernet")) == {12.5}
    assert set(bandwidths(p4d, "gpu", "nvswitch")) == {300.0}
    a6000, turing = BUILDERS["pcie_box"](nodes=6), BUILDERS["pcie_box"](gpu="2080ti", nodes=8)
    assert set(bandwidths(a6000, "gpu", "gpu")) == {56.25}
    assert set(bandwidths(a6000, "nic0", "infiniband")) == {25.0}
    assert not bandwidths(turing, "gpu", "gpu")
    assert set(bandwidths(turing, "nic0", "infiniband")) == {12.5}


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("rail_optimised", {}, "dgx_a100, dgx_h100"),
        ("rail_optimized", {"node": 3}, "no such parameter\n.*one of nodes, gpus_per_node"),
        ("dgx_a100", {"nodes": 3}, "no parameters"),
        ("fat_tree", {"nodes": 0}, "parameters.nodes: must be an integer, 1 or more\n.*0"),
        ("fat_tree", {"nodes": True}, "must be an integer"),
        ("fat_tree", {"nodes": 10**12}, "more than 200000"),
        ("fat_tree", {"scale_up_GBps": 10**400}, "finite number"),
        ("fat_tree", {"oversubscription": -1.0}, "above 0"),
        ("torus", {"dims": ["4", 4]}, "must be integers"),
        ("torus", {"dims": (4,)}, "two or three dimensions"),
        ("torus", {"dims": (4, 1)}, "of 2 or more"),
        ("torus", {"dims": (10**9, 10**9)}, "more than 200000"),
        ("pcie_box", {"gpu": "a100"}, "a6000, 2080ti"),
    ],
)
def test_bad_parameters_are_explained(name, parameters, words):
    with pytest.raises(ScaleMoEError, match=words):
        build_topology(name, parameters)


def test_one_gpu_is_a_cluster_too():
    for name, parameters in {
        "ring": {"gpus": 1},
        "fully_connected": {"gpus": 1},
        "rail_optimized": {"nodes": 1, "gpus_per_node": 1},
    }.items():
        assert compute_routes(BUILDERS[name](**parameters)).latency_us.tolist() == [[0.0]]
