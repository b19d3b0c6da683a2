"""`nvidia-smi topo -m`: what the matrix says must come out as links, however it was pasted; damage is told by line."""

from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.discover.layout import GPU_MODELS, UNKNOWN_MODEL, model_of_name
from megatron_scalemoe.topology.discover.nvidia_smi import parse_matrix, read_nvidia_smi
from megatron_scalemoe.topology.routes import compute_routes

SAMPLES = Path(__file__).parent / "samples"
DGX, A6000, L40S, V100 = (SAMPLES / f"nvidia_smi_{name}.txt" for name in ("dgx_h100", "pcie_a6000", "pcie_l40s", "v100_mesh"))


def links_of(layout) -> dict:
    return {(u, v): d["bandwidth_GBps"] for u, v, d in layout.topology.graph.edges(data=True)}


def write(tmp_path, text: str) -> Path:
    (tmp_path / "topo.txt").write_text(text)
    return tmp_path / "topo.txt"


def test_an_nvswitch_box_has_the_routes_of_the_builder():
    layout = read_nvidia_smi(DGX)
    routes, built = compute_routes(layout.topology), compute_routes(BUILDERS["dgx_h100"]())
    np.testing.assert_allclose(routes.bandwidth_GBps, built.bandwidth_GBps)
    np.testing.assert_allclose(routes.latency_us, built.latency_us)
    assert layout.nic_GBps == {f"node0/nic{i}": 50.0 for i in range(8)}


def test_a_gpu_and_its_nic_share_a_switch_and_numa_nodes_share_a_socket_link():
    layout = read_nvidia_smi(DGX)
    graph = layout.topology.graph
    for i in range(8):
        (switch,) = set(graph.successors(f"node0/nic{i}"))
        assert switch in graph.successors(f"node0/gpu{i}")
        assert graph.has_edge(switch, f"node0/cpu{i // 4}")
    assert graph.has_edge("node0/cpu0", "node0/cpu1")


def test_bridges_between_pairs_are_direct_links():
    layout = read_nvidia_smi(A6000, "a6000")
    direct = {pair: rate for pair, rate in links_of(layout).items() if all("/gpu" in end for end in pair)}
    expected = {(f"node0/gpu{i}", f"node0/gpu{i ^ 1}"): 56.25 for i in range(8)}
    assert direct == expected


def test_a_mesh_of_single_and_double_nvlinks_keeps_their_numbers():
    links = links_of(read_nvidia_smi(V100, "v100"))
    assert links["node0/gpu0", "node0/gpu1"] == 25
    assert links["node0/gpu0", "node0/gpu3"] == 50
    assert not any("nvswitch" in end for pair in links for end in pair)


@pytest.mark.parametrize(("cell", "through_switch"), [("NV2", False), ("NV4", True)])
def test_nvswitch_is_told_by_the_models_number_of_links(tmp_path, cell, through_switch):
    """Three P100 have four links each: two to both others are a mesh, four to both others must be the same four."""
    path = write(tmp_path, f"GPU0 GPU1 GPU2\nGPU0 X {cell} {cell}\nGPU1 {cell} X {cell}\nGPU2 {cell} {cell} X\n")
    links = links_of(read_nvidia_smi(path, "p100"))
    assert (("node0/gpu0", "node0/nvswitch") in links) == through_switch
    assert links["node0/gpu0", "node0/nvswitch" if through_switch else "node0/gpu1"] == (80 if through_switch else 40)


def test_pcie_classes_become_a_tree():
    graph = read_nvidia_smi(L40S).topology.graph
    assert set(graph.successors("node0/gpu0")) & set(graph.successors("node0/gpu1"))
    assert not set(graph.successors("node0/gpu1")) & set(graph.successors("node0/gpu2"))
    (nic_switch,) = set(graph.successors("node0/nic0")) & set(graph.successors("node0/nic1"))
    bridges = {v for v in graph.successors(nic_switch) if "bridge" in v}
    (gpu_switch,) = graph.successors("node0/gpu0")
    assert bridges & set(graph.successors(gpu_switch)), "PHB: both switches under one root complex"


def test_distance_grows_with_the_class():
    latency = compute_routes(read_nvidia_smi(A6000).topology).latency_us
    assert latency[0, 1] < latency[0, 2] < latency[0, 4]  # NVLink, NODE, SYS


def test_white_space_colours_and_the_old_word_for_sys_do_not_matter(tmp_path):
    text = A6000.read_text()
    plain = parse_matrix(A6000, text)
    assert parse_matrix(A6000, text.replace("SYS", "SOC")) == plain
    assert parse_matrix(A6000, "\n".join("\t".join(f"\x1b[1m{w}\x1b[0m" for w in line.split()) for line in text.splitlines())) == plain
    assert parse_matrix(A6000, text.replace("\n", "\r\n")) == plain
    assert plain.numa == (0, 0, 0, 0, 1, 1, 1, 1, None)


def test_one_gpu_is_a_matrix_too(tmp_path):
    path = write(tmp_path, "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-7\t0\n")
    assert read_nvidia_smi(path).topology.ranks == ("node0/gpu0",)


def test_assumptions_are_told():
    assert read_nvidia_smi(DGX).notes == ("nvidia-smi does not tell how fast NICs are: taken 400 Gb/s each (--nic-Gbps sets it)",)
    assert read_nvidia_smi(V100, "v100").notes == ()
    assert "NVLinks of 25 GB/s" in read_nvidia_smi(V100).notes[0]
    assert read_nvidia_smi(L40S).notes[0] == "no figures for NVIDIA L40S: taken PCIe of 32 GB/s (--gpu-model sets them)"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A800-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", "h100"),
        ("NVIDIA H200", "h100"),
        ("NVIDIA GB200", "b200"),
        ("NVIDIA B200", "b200"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("Tesla P100-SXM2-16GB", "p100"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA GeForce RTX 3090", "a6000"),
        ("NVIDIA GeForce RTX 2080 Ti", "2080ti"),
        ("NVIDIA RTX 6000 Ada Generation", None),
        ("NVIDIA A10", None),
    ],
)
def test_product_names_are_known(name, key):
    assert model_of_name(name) == key


def test_nvlinks_add_up_to_the_data_sheets():
    totals = {key: 2 * model.nvlink_GBps * model.nvlinks for key, model in GPU_MODELS.items()}
    assert totals == {"p100": 160, "v100": 300, "a100": 600, "h100": 900, "b200": 1800, "a6000": 112.5, "2080ti": 100}
    assert UNKNOWN_MODEL.nvlink_GBps == GPU_MODELS["h100"].nvlink_GBps


HEAD = "\tGPU0\tGPU1\tCPU Affinity\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "no matrix"),
        (HEAD, 1, "the matrix ends before the row of GPU0"),
        (HEAD + "GPU0 X PIX\n", 2, "the matrix ends before the row of GPU1"),
        (HEAD + "GPU0 X PIX\nGPU0 X PIX\n", 3, "expected the row of GPU1"),
        (HEAD + "GPU0 X\nGPU1 PIX X\n", 2, "expected 2 cells in the row of GPU0"),
        (HEAD + "GPU0 X FAST\nGPU1 PIX X\n", 2, "column GPU1: expected one of X, NV#, PIX"),
        (HEAD + "GPU0 X NV0\nGPU1 NV0 X\n", 2, "column GPU1: expected one of"),
        (HEAD + "GPU0 PIX PIX\nGPU1 PIX X\n", 2, "column GPU0: X must stand on the diagonal"),
        (HEAD + "GPU0 X X\nGPU1 X X\n", 2, "column GPU1: X must stand on the diagonal"),
        (HEAD + "GPU0 X PIX\nGPU1 SYS X\n", 3, "GPU1 to GPU0 must be the same as GPU0 to GPU1"),
        ("GPU0 GPU0\nGPU0 X PIX\nGPU0 PIX X\n", 1, "different devices"),
    ],
)
def test_damage_is_told_by_line(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(ScaleMoEError, match="topo") as caught:
        read_nvidia_smi(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


def test_different_gpus_in_a_box_must_be_named(tmp_path):
    listed = "GPU 0: NVIDIA H100 NVL (UUID: GPU-1)\nGPU 1: NVIDIA A100-PCIE-40GB (UUID: GPU-2)\n"
    path = write(tmp_path, listed + HEAD + "GPU0 X NV4\nGPU1 NV4 X\n")
    with pytest.raises(ScaleMoEError, match="GPUs of one model"):
        read_nvidia_smi(path)
    assert read_nvidia_smi(path, "a100").topology.num_ranks == 2


def test_an_unreadable_file_is_an_error(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(ScaleMoEError, match=name):
            read_nvidia_smi(tmp_path / name)
