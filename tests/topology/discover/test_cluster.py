"""Node layout x fabric: the cluster must have the routes that a builder gives the same cluster."""

from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.discover.cluster import cluster_of
from megatron_scalemoe.topology.discover.layout import NodeLayout, layout_of_topology, without_slow_nics
from megatron_scalemoe.topology.discover.nccl_xml import read_nccl_xml
from megatron_scalemoe.topology.discover.nvidia_smi import read_nvidia_smi
from megatron_scalemoe.topology.discover.slurm import read_slurm
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.ports import ports_of
from megatron_scalemoe.topology.routes import compute_routes

SAMPLES = Path(__file__).parent / "samples"
DGX = read_nvidia_smi(SAMPLES / "nvidia_smi_dgx_h100.txt")


def fabric(tmp_path, text: str):
    (tmp_path / "topology.conf").write_text(text)
    return read_slurm(tmp_path / "topology.conf")


def assert_same_routes(one, other):
    one, other = compute_routes(one), compute_routes(other)
    np.testing.assert_allclose(one.latency_us, other.latency_us)
    np.testing.assert_allclose(one.bandwidth_GBps, other.bandwidth_GBps)


def test_rails_from_nvidia_smi_and_slurm_are_the_builders():
    discovered = cluster_of(DGX, read_slurm(SAMPLES / "slurm_rails.conf"))
    assert_same_routes(discovered, BUILDERS["rail_optimized"](nodes=4, spines=2))


@pytest.mark.parametrize("oversubscription", [1.0, 4.0])
def test_a_tree_of_leaves_is_the_builders_fat_tree(tmp_path, oversubscription):
    text = "SwitchName=l0 Nodes=n[0-1]\nSwitchName=l1 Nodes=n[2-3]\nSwitchName=top Switches=l[0-1]\n"
    discovered = cluster_of(DGX, fabric(tmp_path, text), oversubscription=oversubscription)
    built = BUILDERS["fat_tree"](nodes=4, nodes_per_leaf=2, spines=1, oversubscription=oversubscription)
    assert_same_routes(discovered, built)
    assert discovered.graph.edges["l0", "top"]["bandwidth_GBps"] == built.graph.edges["leaf0", "spine0"]["bandwidth_GBps"]


def test_a_built_node_keeps_the_speed_of_its_link_to_the_network(tmp_path):
    layout = layout_of_topology(BUILDERS["p4d"](nodes=1, network_Gbps=50.0))
    assert layout.nic_GBps == {"node0/nic0": 6.25}
    discovered = cluster_of(layout, fabric(tmp_path, "SwitchName=s Nodes=a,b\n"))
    assert compute_routes(discovered).bandwidth_GBps[0, 8] == 6.25
    assert discovered.node_of_rank.tolist() == [0] * 8 + [1] * 8


@pytest.mark.parametrize(("name", "GBps"), [("dgx_a100", 25), ("dgx_h100", 50)])
def test_a_built_node_without_network_gets_the_nics_of_its_slots_and_says_so(tmp_path, name, GBps):
    layout = layout_of_topology(BUILDERS[name]())
    assert f"{GBps * 8} Gb/s" in layout.notes[0]
    assert compute_routes(cluster_of(layout, fabric(tmp_path, "SwitchName=s Nodes=a,b\n"))).bandwidth_GBps[0, 8] == GBps


def node_of_nics(nics: dict[str, tuple[float, float, str]], gpus: int = 1) -> NodeLayout:
    """GPUs on one socket. nics: speed, slot (GB/s) and what they hang on, the socket itself or a PCIe switch of its own."""
    vertices = [(f"node0/gpu{i}", "gpu", 0) for i in range(gpus)] + [("node0/cpu0", "node", 0)]
    cables = [(f"node0/gpu{i}", "node0/cpu0", 500.0, 0.5) for i in range(gpus)]
    for name, (_, slot_GBps, above) in nics.items():
        vertices.append((name, "nic", 0))
        if (above, "switch", 0) not in vertices and above != "node0/cpu0":
            vertices.append((above, "switch", 0))
            cables.append((above, "node0/cpu0", 500.0, 0.2))
        cables.append((name, above, slot_GBps, 0.3 if above != "node0/cpu0" else 0.5))
    links = [link for a, b, *figures in cables for link in ((a, b, *figures), (b, a, *figures))]
    return NodeLayout(Topology.build("node", vertices, links), {name: speed for name, (speed, *_) in nics.items()})


@pytest.mark.parametrize("seed", range(25))
def test_links_and_ports_agree_on_one_pair_whatever_the_nics(tmp_path, seed):
    rng = np.random.default_rng(seed)
    above = [["node0/cpu0"], ["node0/pcie0", "node0/pcie1"], ["node0/pcie0", "node0/pcie1", "node0/pcie2"]][seed % 3]
    nics = {
        f"node0/nic{i}": (float(rng.choice([1, 12.5, 25, 50])), float(rng.choice([8, 32, 64])), str(rng.choice(above)))
        for i in range(rng.integers(1, 6))
    }
    leaves = ("SwitchName=s Nodes=n[1-3]\n", "SwitchName=l0 Nodes=n[1-3]\nSwitchName=l1 Nodes=n[1-3]\nSwitchName=top Switches=l[0-1]\n")
    cluster = cluster_of(node_of_nics(nics, gpus=int(rng.integers(1, 3))), fabric(tmp_path, leaves[seed % 4 == 3]))
    routes = compute_routes(cluster)
    ports = ports_of(cluster, routes)
    np.testing.assert_allclose(routes.bandwidth_GBps, ports.pair_GBps())
    # And together: one node's ranks with all others is as fast as the ports say.
    far_GG = (cluster.node_of_rank[:, None] == 0) & (cluster.node_of_rank != 0)
    link_us = (routes.link_load(far_GG * 1e6) / cluster.bandwidth_GBps).max() / 1e3
    assert ports.busy_us(far_GG * 1e6).max() == pytest.approx(link_us)


@pytest.mark.parametrize(("slow_GBps", "pair_GBps"), [(0.125, 25), (3.125, 25), (12.5, 37.5), (25, 50)])
def test_nics_far_below_the_fastest_carry_nothing_and_others_their_part(tmp_path, slow_GBps, pair_GBps):
    layout = without_slow_nics(node_of_nics({"node0/nic0": (25, 32, "node0/cpu0"), "node0/nic1": (slow_GBps, 32, "node0/cpu0")}))
    cluster = cluster_of(layout, fabric(tmp_path, "SwitchName=s Nodes=a,b\n"))
    assert compute_routes(cluster).bandwidth_GBps[0, 1] == pytest.approx(pair_GBps)
    assert [("nic1" in note) for note in layout.notes] == [True] * (slow_GBps < 12.5)


def test_hosts_are_taken_in_the_given_order_and_alone():
    conf = read_slurm(SAMPLES / "slurm_tree.conf")
    both = cluster_of(DGX, conf, hosts=["dgx005", "dgx001"])
    assert both.num_nodes == 2
    assert both.graph.has_edge("node0/nic0", "leaf2")
    assert both.graph.has_edge("node1/nic0", "leaf1")
    assert "leaf3" not in both.graph
    assert "leaf1" not in cluster_of(DGX, conf, hosts=["dgx005", "dgx006"]).graph


def test_linkspeed_caps_known_nics_and_gives_unknown_ones_their_speed():
    conf = read_slurm(SAMPLES / "slurm_tree.conf")
    edges = cluster_of(DGX, conf, hosts=["dgx001", "dgx005"]).graph.edges
    assert edges["node0/nic0", "leaf1"]["bandwidth_GBps"] == 25  # NDR NICs, LinkSpeed=200
    assert edges["node1/nic0", "leaf2"]["bandwidth_GBps"] == 50
    unknown = layout_of_topology(BUILDERS["dgx_h100"]())
    edges = cluster_of(unknown, conf, hosts=["dgx001", "dgx005"]).graph.edges
    assert edges["node0/nic0", "leaf1"]["bandwidth_GBps"] == 25
    assert edges["node1/nic0", "leaf2"]["bandwidth_GBps"] == 50


@pytest.mark.parametrize("name", ["nvidia_smi_pcie_a6000.txt", "nvidia_smi_pcie_l40s.txt", "nccl_pcie_a6000.xml", "nccl_dgx_h100.xml"])
def test_traffic_inside_a_node_never_leaves_it(tmp_path, name):
    layout = read_nccl_xml(SAMPLES / name) if name.endswith("xml") else read_nvidia_smi(SAMPLES / name)
    cluster = cluster_of(layout, fabric(tmp_path, "SwitchName=s Nodes=a,b\n"))
    same_node_GG = (cluster.node_of_rank[:, None] == cluster.node_of_rank).astype(float)
    load_M = compute_routes(cluster).link_load(same_node_GG)
    used = {end for link, load in zip(cluster.links, load_M, strict=True) if load for end in link}
    assert "s" not in used
    assert used > set(cluster.ranks)


def test_a_gpu_sends_to_other_nodes_through_its_own_nic():
    cluster = cluster_of(DGX, read_slurm(SAMPLES / "slurm_rails.conf"))
    routes = compute_routes(cluster)
    for rank in range(8):
        traffic = np.zeros((32, 32))
        traffic[rank, 8:] = 1
        used = {link[0] for link, load in zip(cluster.links, routes.link_load(traffic), strict=True) if load}
        assert {v for v in used if v.startswith("node0/nic")} == {f"node0/nic{rank}"}


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("SwitchName=s Nodes=a,b\n", {"hosts": ["a", "x", "y"]}, "not there: x, y"),
        ("SwitchName=s Nodes=a\nSwitchName=t Nodes=b\n", {}, "do not hang together"),
        ("SwitchName=s Nodes=a\n", {"oversubscription": 0.0}, "--oversubscription must be"),
        ("SwitchName=s Nodes=a\n", {"oversubscription": float("inf")}, "--oversubscription must be"),
        ("SwitchName=s Nodes=a[1-9999]\n", {}, "at most 200000 links"),
    ],
)
def test_what_makes_no_cluster_is_refused(tmp_path, text, arguments, message):
    with pytest.raises(ScaleMoEError, match=message):
        cluster_of(DGX, fabric(tmp_path, text), **arguments)


def test_a_layout_must_have_a_nic_and_be_one_node(tmp_path):
    with pytest.raises(ScaleMoEError, match="needs a NIC"):
        cluster_of(read_nvidia_smi(SAMPLES / "nvidia_smi_v100_mesh.txt"), fabric(tmp_path, "SwitchName=s Nodes=a\n"))
    with pytest.raises(ScaleMoEError, match="has 2 nodes"):
        layout_of_topology(BUILDERS["p4d"](nodes=2))
