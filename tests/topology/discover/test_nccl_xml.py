"""NCCL's topology XML: devices, links and speeds as the file gives them; damage is told by line."""

from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.discover.nccl_xml import read_nccl_xml
from megatron_scalemoe.topology.discover.nvidia_smi import read_nvidia_smi
from megatron_scalemoe.topology.graph import Override
from megatron_scalemoe.topology.routes import compute_routes

SAMPLES = Path(__file__).parent / "samples"
DGX, A6000, GB200 = (SAMPLES / f"nccl_{name}.xml" for name in ("dgx_h100", "pcie_a6000", "gb200_two_trays"))
PCI = '<pci busid="0000:0{0}:00.0" link_speed="16.0 GT/s PCIe" link_width="16">{1}</pci>'


def links_of(layout) -> dict:
    return {(u, v): d["bandwidth_GBps"] for u, v, d in layout.topology.graph.edges(data=True)}


def read(tmp_path, text: str):
    (tmp_path / "topo.xml").write_text(text)
    return read_nccl_xml(tmp_path / "topo.xml")


def system(*gpus: str) -> str:
    """One <cpu> with a <pci> for each GPU."""
    return "<system>\n<cpu numaid='0'>" + "".join(PCI.format(i, gpu) for i, gpu in enumerate(gpus)) + "</cpu></system>"


def test_the_same_box_is_the_same_from_nvidia_smi_and_from_nccl():
    nccl, smi = read_nccl_xml(DGX), read_nvidia_smi(SAMPLES / "nvidia_smi_dgx_h100.txt")
    # Only NCCL says which processor it is, and so how fast its socket link.
    sockets = [Override(f"node0/cpu{i}->node0/cpu{1 - i}", bandwidth_GBps=22) for i in range(2)]
    assert nccl.topology.content_hash == smi.topology.overridden(*sockets).content_hash
    assert nccl.nic_GBps == smi.nic_GBps
    assert nccl.notes == ()


def test_nvlinks_of_all_switch_planes_add_up():
    links = links_of(read_nccl_xml(DGX))
    assert [links[f"node0/gpu{i}", "node0/nvswitch"] for i in range(8)] == [450] * 8


def test_a_bridge_given_at_both_ends_counts_once():
    links = links_of(read_nccl_xml(A6000))
    assert links["node0/gpu0", "node0/gpu1"] == links["node0/gpu1", "node0/gpu0"] == 56.25


def test_pcie_speed_is_lanes_times_rate():
    links = links_of(read_nccl_xml(A6000))
    assert links["node0/gpu2", "node0/cpu1"] == 32  # 16 GT/s x16
    assert links["node0/nic0", "node0/cpu0"] == 16  # 16 GT/s x8
    assert links["node0/gpu3", "node0/cpu1"] == 16  # speed missing: generation 3


def test_ports_of_a_nic_add_up_and_an_unknown_speed_is_told():
    layout = read_nccl_xml(A6000)
    assert layout.nic_GBps == {"node0/nic0": 25.0, "node0/nic1": 1.25}
    assert layout.notes == ("line 33: the speed of eth0 is not known: taken 10 Gb/s",)


def test_devices_that_are_no_gpu_and_no_nic_are_left_out():
    assert sum(v.kind == "switch" for v in read_nccl_xml(A6000).topology.vertices) == 1


@pytest.mark.parametrize(
    ("attributes", "bandwidth"),
    [
        ('vendor="GenuineIntel" familyid="6" modelid="207"', 40),
        ('vendor="GenuineIntel" familyid="6" modelid="143"', 22),
        ('vendor="GenuineIntel" familyid="6" modelid="85"', 10),
        ('vendor="GenuineIntel" familyid="6" modelid="79"', 6),
        ('vendor="AuthenticAMD" familyid="26" modelid="2"', 32),
        ('vendor="AuthenticAMD" familyid="25" modelid="1"', 24),
        ('vendor="AuthenticAMD" familyid="23" modelid="49"', 16),
        ("", 22.5),
    ],
)
def test_processors_differ_in_their_socket_link(tmp_path, attributes, bandwidth):
    gpus = [PCI.format(i, f'<gpu dev="{i}" sm="80"/>') for i in range(2)]
    text = "<system>" + "".join(f'<cpu numaid="{i}" {attributes}>{gpu}</cpu>' for i, gpu in enumerate(gpus)) + "</system>"
    assert links_of(read(tmp_path, text))["node0/cpu0", "node0/cpu1"] == bandwidth


def test_a_fused_file_is_one_nvlink_domain_in_rank_order():
    layout = read_nccl_xml(GB200)
    routes = compute_routes(layout.topology)
    assert layout.topology.num_ranks == 8
    np.testing.assert_array_equal(routes.bandwidth_GBps[~np.eye(8, dtype=bool)], 900)
    assert not layout.topology.graph.has_edge("node0/cpu1", "node0/cpu2"), "two machines"
    assert "2 machines of one NVLink domain" in layout.notes[0]


def test_c2c_replaces_the_slow_slot():
    assert links_of(read_nccl_xml(GB200))["node0/gpu0", "node0/cpu0"] == 225


def test_an_nvlink_whose_other_end_is_no_rank_is_left_out_and_told(tmp_path):
    ends = {"0000:bd:00.0": "0x030200", "0000:00:00.0": "0x030200", "0000:01:00.0": "0x030200", "0004:00": "0x068001"}
    links = "".join(f"<nvlink target='{end}' count='4' tclass='{tclass}'/>" for end, tclass in ends.items())
    layout = read(tmp_path, system(f"<gpu dev='0' sm='80'>{links}</gpu>", "<gpu dev='1' sm='80'/>"))
    assert [link for link in links_of(layout) if "cpu" not in "".join(link)] == [("node0/gpu0", "node0/gpu1"), ("node0/gpu1", "node0/gpu0")]
    (note,) = layout.notes
    assert note.startswith("line 2: NVLink to 0000:bd:00.0 and 2 more")


NET = "<nic><net name='a' dev='0' speed='100000' port='1'/></nic>"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (system("<gpu dev='0' sm='90'><xgmi target='x' count='1' tclass='0x03'/></gpu>"), "<xgmi>"),
        (system("<gpu dev='0' sm='90'/>", NET), None),
        (system("<gpu dev='0' sm='90'/>", NET, NET).replace("0000:02:00.0", "0000:01:00.1"), "virtual functions"),
        (system("<gpu dev='0' sm='90'/>", NET, NET.replace("port='1'", "port='2'")).replace("0000:02:00.0", "0000:01:00.1"), None),
    ],
)
def test_what_the_layout_leaves_out_is_told(tmp_path, text, told):
    notes = read(tmp_path, text).notes
    assert [told in note for note in notes] == [True] if told else notes == ()


LINKED = '<gpu dev="{0}" sm="80"{1}><nvlink target="x" count="{2}" tclass="0x068000"/></gpu>'


def test_gpus_come_in_order_of_rank_if_all_have_one(tmp_path):
    links = links_of(read(tmp_path, system(LINKED.format(0, ' rank="9"', 1), LINKED.format(1, ' rank="8"', 2))))
    assert links["node0/gpu0", "node0/nvswitch"] == 50
    assert links["node0/gpu1", "node0/nvswitch"] == 25


def test_gpus_come_in_order_of_device_otherwise(tmp_path):
    links = links_of(read(tmp_path, system(LINKED.format(7, "", 1), LINKED.format(3, ' rank="9"', 2))))
    assert links["node0/gpu0", "node0/nvswitch"] == 50
    assert links["node0/gpu1", "node0/nvswitch"] == 25


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<system><cpu></system>", "not valid XML"),
        ("<graphs version='1'/>", "expected <system>"),
        ("<system/>", "expected <gpu> elements"),
        ("<system><cpu><gpu dev='0' sm='80'/></cpu></system>", "must stand in a <pci>"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><system/>', "no document type"),
        (system("<gpu sm='80'/>"), "attribute 'dev' is missing"),
        (system("<gpu dev='one' sm='80'/>"), "attribute 'dev' must be an integer"),
        (system("<gpu dev='0' sm='80'><nvlink target='a' count='0' tclass='0x068000'/></gpu>"), "'count' must be 1 or more"),
        (system("<gpu dev='0' sm='80'><nvlink target='a' count='1' tclass='0x01'/></gpu>"), "'tclass' must be"),
        (system("<gpu dev='0' sm='80'/>").replace('link_width="16"', 'link_width="99"'), "'link_width' must be 1 to 32"),
        ("<a>" * 300 + "</a>" * 300, "not valid XML"),
    ],
)
def test_damage_is_told_by_line(tmp_path, text, message):
    with pytest.raises(ScaleMoEError) as caught:
        read(tmp_path, "\n\n" + text)
    assert str(caught.value).startswith(f"{tmp_path}/topo.xml:")
    assert message in str(caught.value)


def test_the_line_is_the_elements(tmp_path):
    with pytest.raises(ScaleMoEError, match=r"topo.xml:2: <gpu>: attribute 'dev' is missing"):
        read(tmp_path, system("<gpu sm='80'/>"))


def test_entities_neither_unfold_nor_read_other_files(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("7")
    external = f'<!DOCTYPE system [<!ENTITY x SYSTEM "file://{secret}">]><system>&x;</system>'
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<!DOCTYPE system [<!ENTITY a0 "aaaaaaaaaa">{levels}]><system x="&a9;">&a9;</system>'
    for text in (external, bomb, bomb.replace("&a9;<", "<"), '<!DOCTYPE system SYSTEM "http://127.0.0.1:9/x.dtd"><system/>'):
        with pytest.raises(ScaleMoEError, match=r"topo.xml:1: (expected no document type|not valid XML)"):
            read(tmp_path, text)
