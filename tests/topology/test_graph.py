"""`Topology`: what it accepts, what it says about what it refuses, and its derived topologies."""

import math

import networkx as nx
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.graph import Override, Topology, UnreachableError
from tests.topology.small import SMALL

VERTICES = [("a", "gpu", 0), ("s", "switch", None), ("b", "gpu", 1)]
LINKS = [("a", "s", 10, 1), ("s", "a", 20, 1), ("s", "b", 30, 2), ("b", "s", 40, 2)]


def test_ranks_links_and_nodes_keep_the_order_they_were_given_in():
    topology = Topology.build("pair", VERTICES, [LINKS[3], *LINKS[:3]])
    assert topology.ranks == ("a", "b")
    assert topology.node_of_rank.tolist() == [0, 1]
    assert (topology.num_ranks, topology.num_nodes) == (2, 2)
    # networkx lists edges by source vertex.
    expected = {link[:2]: link[2:] for link in LINKS}
    assert [(b, l) for b, l in zip(topology.bandwidth_GBps, topology.latency_us, strict=True)] == [expected[k] for k in topology.links]


def test_the_graph_cannot_be_changed():
    with pytest.raises(nx.NetworkXError):
        Topology.build("pair", VERTICES, LINKS).graph.add_node("c")


@pytest.mark.parametrize(
    ("vertices", "field", "words"),
    [
        ([*VERTICES, ("a", "switch", None)], ("vertices", 3, "name"), "differ"),
        ([*VERTICES, ("", "switch", None)], ("vertices", 3, "name"), "printable"),
        ([*VERTICES, ("x->y", "switch", None)], ("vertices", 3, "name"), "->"),
        ([*VERTICES, ("c", "cpu", None)], ("vertices", 3, "kind"), "gpu, switch, nic, node"),
        ([*VERTICES, ("c", "gpu", None)], ("vertices", 3, "node"), "number of its node"),
        ([*VERTICES, ("c", "nic", -1)], ("vertices", 3, "node"), "0 or more"),
        ([*VERTICES, ("c", "gpu", 3)], ("vertices", 3, "node"), "here 2 or less"),
        ([("s", "switch", None)], ("vertices",), "kind gpu"),
    ],
)
def test_a_wrong_vertex_is_named(vertices, field, words):
    links = LINKS if len(vertices) > 1 else []
    with pytest.raises(ScaleMoEError, match=words) as error:
        Topology.build("bad", vertices, links)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("link", "key", "words"),
    [
        (("a", "x", 1, 1), "target", "'x'"),
        (("x", "a", 1, 1), "source", "'x'"),
        (("a", "a", 1, 1), "target", "differ"),
        (("a", "s", 1, 1), "target", "already given"),
        (("a", "b", 0, 1), "bandwidth_GBps", "above 0"),
        (("a", "b", math.inf, 1), "bandwidth_GBps", "finite"),
        (("a", "b", 1, -1), "latency_us", "0 or more"),
    ],
)
def test_a_wrong_link_is_named(link, key, words):
    with pytest.raises(ScaleMoEError, match=words) as error:
        Topology.build("bad", VERTICES, [*LINKS, link])
    assert error.value.field == ("links", 4, key)


@pytest.mark.parametrize(("missing", "pair"), [(0, "a cannot reach b"), (1, "b cannot reach a"), (2, "a cannot reach b")])
def test_gpus_that_cannot_reach_each_other_are_named(missing, pair):
    with pytest.raises(UnreachableError, match=pair):
        Topology.build("cut", VERTICES, [link for i, link in enumerate(LINKS) if i != missing])


def test_a_gpu_among_switches_forwards_nothing():
    """a - s - b and b - c: c is reached only through b, which has a switch too."""
    with pytest.raises(UnreachableError, match="a cannot reach c"):
        Topology.build("chain", [*VERTICES, ("c", "gpu", 1)], [*LINKS, ("b", "c", 1, 1), ("c", "b", 1, 1)])


def test_only_gpus_of_a_mesh_forward():
    forwarding = {name for name, topology in SMALL.items() if len(topology.endpoints) < topology.num_ranks}
    assert forwarding == {"torus", "torus_3d", "ring"}
    assert all(not SMALL[name].endpoints for name in forwarding)


def test_the_hash_depends_on_content_alone():
    one = Topology.build("one", VERTICES, LINKS)
    assert one.content_hash == Topology.build("other", VERTICES, LINKS[::-1]).content_hash
    changed = [
        Topology.build("one", VERTICES, [*LINKS[:3], ("b", "s", 41, 2)]),
        Topology.build("one", [("a", "gpu", 0), ("s", "nic", None), ("b", "gpu", 1)], LINKS),
        Topology.build("one", [("b", "gpu", 0), ("s", "switch", None), ("a", "gpu", 1)], LINKS),
    ]
    assert len({one.content_hash, *(t.content_hash for t in changed)}) == 4


def test_an_override_of_a_node_changes_the_links_that_leave_it():
    topology = SMALL["p4d"]
    slow = topology.overridden(Override("node1", scale=0.5))
    changed = {link for link, old, new in zip(topology.links, topology.bandwidth_GBps, slow.bandwidth_GBps, strict=True) if old != new}
    assert changed == {("node1/nic0", "ethernet"), ("ethernet", "node1/nic0")}
    assert slow.graph.edges["ethernet", "node1/nic0"]["bandwidth_GBps"] == 6.25
    assert topology.graph.edges["ethernet", "node1/nic0"]["bandwidth_GBps"] == 12.5
    assert slow.overrides == (Override("node1", scale=0.5),)


def test_overrides_of_vertices_and_links_add_up_in_order():
    topology = Topology.build("pair", VERTICES, LINKS).overridden(Override("s", bandwidth_GBps=8), Override("s -> b", scale=0.5))
    assert dict(zip(topology.links, topology.bandwidth_GBps, strict=True)) == {("a", "s"): 8, ("s", "a"): 8, ("s", "b"): 4, ("b", "s"): 8}
    assert topology.latency_us.sum() == 6


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (Override("node9", scale=0.5), "node0..node1"),
        (Override("b -> a", scale=0.5), "no link matches"),
        (Override("nonsense", scale=0.5), "'nonsense'"),
        (Override("a", scale=0), "scale: must be finite and above 0"),
        (Override("a"), "either"),
        (Override("a", 1, 1), "either"),
    ],
)
def test_a_wrong_override_is_explained(override, words):
    with pytest.raises(ScaleMoEError, match=words):
        Topology.build("pair", VERTICES, LINKS).overridden(override)


def test_a_subset_is_the_cluster_of_the_first_ranks():
    whole = BUILDERS["rail_optimized"](nodes=4, gpus_per_node=2)
    part = whole.subset(4)
    assert part.ranks == whole.ranks[:4]
    assert (
        part.content_hash
        == BUILDERS["rail_optimized"](nodes=2, gpus_per_node=2, scale_out_GBps=50.0)
        .overridden(
            *(Override(f"group0/rail{r}->spine{s}", bandwidth_GBps=50.0) for r in range(2) for s in range(4)),
            *(Override(f"spine{s}->group0/rail{r}", bandwidth_GBps=50.0) for r in range(2) for s in range(4)),
        )
        .content_hash
    )
    assert whole.subset(8) is whole


@pytest.mark.parametrize("ranks", [0, -1, 9])
def test_a_subset_of_more_ranks_than_there_are_is_refused(ranks):
    with pytest.raises(ScaleMoEError, match="has 8 ranks"):
        SMALL["dgx_a100"].subset(ranks)


def test_a_subset_keeps_overridden_bandwidths_and_forgets_the_builder():
    part = SMALL["throttled"].subset(2)
    assert part.builder is None
    assert part.graph.edges["node0/gpu1", "node0/nvswitch"]["bandwidth_GBps"] == 3
