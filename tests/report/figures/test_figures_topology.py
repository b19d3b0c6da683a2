import pytest

from megatron_scalemoe.report.figures.topology import bandwidth_panel
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.graph import Link, Override, Topology, Vertex
from megatron_scalemoe.topology.routes import compute_routes
from tests.report.figures.svg import texts


def cluster(*, slow_node: int | None = None) -> Topology:
    """3 nodes of 2 GPUs: 300 GB/s inside, 40 GB/s per GPU to the fabric."""
    vertices = [Vertex("fabric", "switch", None), *(Vertex(f"g{i}", "gpu", i // 2) for i in range(6))]
    pairs = [(f"g{i}", "fabric", 40.0, 2.0) for i in range(6)]
    pairs += [(f"g{i}", f"g{i + 1}", 300.0, 1.0) for i in (0, 2, 4)]
    links = [Link(*ends, *rest) for a, b, *rest in pairs for ends in ((a, b), (b, a))]
    topology = Topology.build("t", vertices, links)
    return topology if slow_node is None else topology.overridden(Override(f"node{slow_node}", scale=0.5))


def test_the_title_gives_the_bandwidths_of_pairs():
    panel = bandwidth_panel(cluster(), compute_routes(cluster()))
    assert panel.title == "Two GPUs alone reach inside a node 300 GB/s, between nodes 40 GB/s"
    assert panel.table.rows == [[str(node), "2", "300", "40", "4"] for node in range(3)]
    assert {"40", "300", "from rank", "to rank"} <= set(texts(panel.svg))


def test_a_throttled_node_is_named():
    panel = bandwidth_panel(cluster(slow_node=1), compute_routes(cluster(slow_node=1)))
    assert panel.title == "Two GPUs alone reach inside a node 300 GB/s, between nodes 20 to 40 GB/s, node 1 is the slowest"
    assert [row[3] for row in panel.table.rows] == ["30", "20", "30"]


@pytest.mark.parametrize(("builder", "expected"), [("ring", "inside a node"), ("dgx_h100", "inside a node 450 GB/s"), ("nvl72", "inside")])
def test_one_node_has_no_others(builder, expected):
    topology = build_topology(builder, {})
    panel = bandwidth_panel(topology, compute_routes(topology))
    assert expected in panel.title
    if topology.num_nodes == 1:
        assert panel.table.rows[0][3] == "–"
        assert "between" not in panel.title
