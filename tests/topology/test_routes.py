"""`Routes` against a slow twin that lists all shortest paths with networkx."""

from collections import defaultdict

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import compute_routes
from tests.topology.small import SMALL, random_topology


def pair_flow(topology: Topology, source: str, target: str) -> tuple[float, dict[tuple[str, str], float]]:
    """Latency, and the share of the pair's traffic on each link. Shortest by latency, then hops; equal split at each vertex."""
    others = [gpu for gpu in topology.endpoints if gpu not in (source, target)]
    graph = nx.DiGraph(topology.graph)
    graph.remove_nodes_from(others)
    for *_, data in graph.edges(data=True):
        data["length"] = round(data["latency_us"] * 10_000) * 10_000 + 1
    paths = list(nx.all_shortest_paths(graph, source, target, weight="length"))
    next_hops = defaultdict(set)
    for path in paths:
        for u, v in zip(path, path[1:], strict=False):
            next_hops[u].add(v)
    flow, at = defaultdict(float), {source: 1.0}
    for vertex in nx.topological_sort(nx.DiGraph([(u, v) for u, vs in next_hops.items() for v in vs])):
        for following in next_hops[vertex]:
            share = at[vertex] / len(next_hops[vertex])
            flow[vertex, following] += share
            at[following] = at.get(following, 0) + share
    return sum(graph.edges[link]["latency_us"] for link in zip(paths[0], paths[0][1:], strict=False)), flow


def assert_equals_the_twin(topology: Topology) -> None:
    routes = compute_routes(topology)
    ranks = topology.num_ranks
    incidence = routes.incidence().toarray()
    bandwidth = dict(zip(topology.links, topology.bandwidth_GBps, strict=True))
    for i, source in enumerate(topology.ranks):
        for j, target in enumerate(topology.ranks):
            if i == j:
                assert routes.latency_us[i, j] == 0
                assert routes.bandwidth_GBps[i, j] == np.inf
                assert not incidence[i * ranks + j].any()
                continue
            latency, flow = pair_flow(topology, source, target)
            assert routes.latency_us[i, j] == pytest.approx(latency, abs=1e-9)
            np.testing.assert_allclose(incidence[i * ranks + j], [flow.get(link, 0) for link in topology.links], atol=1e-12)
            assert routes.bandwidth_GBps[i, j] == pytest.approx(min(bandwidth[link] / share for link, share in flow.items()))


@pytest.mark.parametrize("name", SMALL)
def test_every_builders_routes_are_the_twins(name):
    assert_equals_the_twin(SMALL[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_routes_of_random_topologies_are_the_twins(seed):
    assert_equals_the_twin(random_topology(seed))


LARGE = {"rail_optimized": {"nodes": 9}, "torus": {"dims": (6, 12)}}


@pytest.mark.parametrize("name", [*SMALL, *(f"large {name}" for name in LARGE)])
def test_link_load_is_the_incidence_times_the_bytes(name):
    """On both sides of the size above which loads are computed without the incidence."""
    large = name.removeprefix("large ")
    routes = compute_routes(SMALL[name] if name in SMALL else BUILDERS[large](**LARGE[large]))
    ranks = routes.num_ranks
    bytes_BGG = np.random.default_rng(0).uniform(0, 1e6, (2, 3, ranks, ranks)) * (np.random.default_rng(1).random((ranks, ranks)) < 0.3)
    expected = bytes_BGG.reshape(6, -1) @ routes.incidence()
    np.testing.assert_allclose(routes.link_load(bytes_BGG), expected.reshape(2, 3, -1), rtol=1e-12)
    np.testing.assert_allclose(routes.link_load(bytes_BGG[1, 2]), expected[5], rtol=1e-12)
    np.testing.assert_allclose(routes.link_flow(bytes_BGG[1, 2]).sum(axis=1), expected[5], rtol=1e-12)


def test_bytes_that_stay_on_their_rank_load_nothing():
    routes = compute_routes(SMALL["torus"])
    assert not routes.link_load(np.eye(12) * 7).any()
    assert not routes.link_load(np.zeros((12, 12))).any()


def test_no_route_of_a_switched_box_passes_a_third_gpu():
    """Even where the way through the neighbour's NVLink would be the faster one."""
    routes = compute_routes(SMALL["pcie_box"])
    assert routes.latency_us[0, 1] == 1
    assert routes.latency_us[1, 3] == routes.latency_us[0, 2] == 2
    through = [i for i, link in enumerate(SMALL["pcie_box"].links) if link == ("node0/gpu0", "node0/gpu1")]
    bytes_GG = np.ones((16, 16))
    bytes_GG[0, 1] = 0
    assert routes.link_load(bytes_GG)[through] == 0


def test_one_row_of_bandwidths_is_that_of_the_matrix():
    for topology in SMALL.values():
        routes = compute_routes(topology)
        np.testing.assert_allclose(routes.bandwidth_from(1), routes.bandwidth_GBps[1])


def test_incidence_is_refused_for_large_clusters():
    with pytest.raises(ScaleMoEError, match="128 ranks"):
        compute_routes(BUILDERS["fat_tree"](nodes=17)).incidence()


def test_routes_are_refused_where_they_would_not_fit_in_memory():
    with pytest.raises(ScaleMoEError, match="4096 ranks"):
        compute_routes(BUILDERS["p4d"](nodes=513))
