"""`NodeLayout`: one machine as a reader found it, and what the readers share: figures of GPU models, hops on PCIe, errors with a line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes
from megatron_scalemoe.topology.builders.machines import A6000_BRIDGE_GBps
from megatron_scalemoe.topology.builders.parts import (
    GBIT_IN_GB,
    GPU_TO_NIC_US,
    HDR_GBps,
    NDR_GBps,
    NVLINK3_GBps,
    NVLINK4_GBps,
    NVLINK5_GBps,
    Parts,
    PCIE3_GBps,
    PCIE4_GBps,
    PCIE5_GBps,
)
from megatron_scalemoe.topology.graph import Topology, Vertex

# One way over PCIe, in us. GPU - switch - NIC takes what the builders' GPU - NIC takes; otherwise the figures are chosen to make routes go
# where NCCL sends traffic: over NVLink (1 us) rather than PCIe (1.1 and more), to the network through the GPU's own NIC even if that means
# a spine (0.6) rather than through the root complex to another's, and never out to the network and back inside a node (2.6).
GPU_HOP_US = 0.55
NIC_HOP_US = GPU_TO_NIC_US - GPU_HOP_US
LEAVE_SWITCH_US = 0.45  # from the switch that holds a device, upwards
INNER_HOP_US = 0.05  # between switches, root complexes and sockets
EDR_GBps = 100 * GBIT_IN_GB
# Below this share of the fastest NIC's speed a NIC carries no traffic of ranks: it is there for management or storage. (NCCL gives a GPU
# the fastest NICs only.)
MIN_NIC_SHARE = 0.5


class GpuModel(NamedTuple):
    """One direction: GB/s per NVLink, NVLinks per GPU, GB/s of its PCIe slot, and of a NIC that is usual beside it."""

    nvlink_GBps: float
    nvlinks: int
    pcie_GBps: float
    nic_GBps: float


# NVIDIA's data sheets, both directions: P100 4 NVLinks x 40 GB/s, V100 6 x 50, A100 12 x 50, H100 18 x 50, B200 18 x 100,
# RTX A6000 and 3090 4 x 28.1, RTX 2080 Ti 2 x 50. NICs: DGX-1 EDR, DGX A100 HDR, DGX H100 and B200 NDR.
GPU_MODELS = {
    "p100": GpuModel(20.0, 4, PCIE3_GBps, EDR_GBps),
    "v100": GpuModel(25.0, 6, PCIE3_GBps, EDR_GBps),
    "a100": GpuModel(NVLINK3_GBps / 12, 12, PCIE4_GBps, HDR_GBps),
    "h100": GpuModel(NVLINK4_GBps / 18, 18, PCIE5_GBps, NDR_GBps),
    "b200": GpuModel(NVLINK5_GBps / 18, 18, PCIE5_GBps, NDR_GBps),
    "a6000": GpuModel(A6000_BRIDGE_GBps / 4, 4, PCIE4_GBps, HDR_GBps),
    "2080ti": GpuModel(25.0, 2, PCIE3_GBps, EDR_GBps),
}
# What a name printed by `nvidia-smi -L` says about the row to take. The first that is found counts.
_NAMES = {
    "p100": r"P100",
    "v100": r"V100",
    "a100": r"A(100|800)\b",
    "h100": r"H(100|200|800|20)\b",
    "b200": r"B[23]00\b",
    "a6000": r"(A6000|A5500|A5000|A40|3090)\b",
    "2080ti": r"(2080|RTX [568]000$|TITAN RTX)",
}
# Where the model is not known: NVLink of V100, A100 and H100 is equally fast per link.
UNKNOWN_MODEL = GpuModel(25.0, 18, PCIE4_GBps, HDR_GBps)


@dataclasses.dataclass(frozen=True)
class NodeLayout:
    """One machine, node 0 of `topology`; it has no fabric, so its NICs lead nowhere yet.

    nic_GBps: what each NIC can send to the network, by vertex; NICs of unknown speed are missing.
    notes: assumptions that the reader made, to tell the user.
    """

    topology: Topology
    nic_GBps: Mapping[str, float]
    notes: tuple[str, ...] = ()


def model_of_name(name: str) -> str | None:
    """The key of GPU_MODELS for a product name such as `NVIDIA A100-SXM4-80GB`; None for one without NVLink, or not known."""
    return next((key for key, pattern in _NAMES.items() if re.search(pattern, name)), None)


def layout_of_parts(path: Path, parts: Parts, nic_GBps: Mapping[str, float], notes: list[str]) -> NodeLayout:
    """Raises `ScaleMoEError` naming the file when the parts make no topology."""
    try:
        topology = Topology.build(path.stem, parts.vertices, parts.links)
    except ScaleMoEError as error:
        raise ScaleMoEError(error.problem, found=error.found, try_="the whole output of one machine", place=str(path)) from error
    return NodeLayout(topology, dict(nic_GBps), tuple(notes))


def layout_of_topology(topology: Topology) -> NodeLayout:
    """From a topology of one node. What belongs to a fabric is dropped; the links to it say how fast the NICs are. A note says what is
    taken where there are none.

    Raises `ScaleMoEError` when there are several nodes, or the GPUs need the fabric to reach each other.
    """
    if topology.num_nodes != 1:
        raise ScaleMoEError("the layout of one node is needed", found=f"{topology.name!r} has {topology.num_nodes} nodes")
    inside = {v.name for v in topology.vertices if v.node is not None}
    nics = {v.name for v in topology.vertices if v.kind == "nic"}
    vertices = [v for v in topology.vertices if v.name in inside]
    links, nic_GBps = [], {}
    for link in topology.full_links:
        if link.source in inside and link.target in inside:
            links.append(link)
        elif link.source in nics:
            nic_GBps[link.source] = nic_GBps.get(link.source, 0.0) + link.bandwidth_GBps
    layout = NodeLayout(Topology.build(topology.name, vertices, links), nic_GBps)
    usual = sorted({usual_nic_GBps(slot_GBps(layout.topology, nic)) * 8 for nic in nics - set(nic_GBps)})
    if usual:
        speeds = " and ".join(f"{gbps:g}" for gbps in usual)
        note = f"the file does not tell how fast NICs are: taken {speeds} Gb/s, usual in such slots, or LinkSpeed (--nic-Gbps sets it)"
        layout = dataclasses.replace(layout, notes=(note,))
    return layout


def slot_GBps(topology: Topology, nic: str) -> float:
    """GB/s between a NIC and its node: it cannot pass on more."""
    return sum(topology.graph.edges[nic, end]["bandwidth_GBps"] for end in topology.graph.successors(nic))


def usual_nic_GBps(slot_GBps: float) -> float:
    """GB/s of the NIC that usually sits in a slot this fast."""
    return NDR_GBps if slot_GBps >= PCIE5_GBps else HDR_GBps if slot_GBps >= PCIE4_GBps else EDR_GBps


def without_slow_nics(layout: NodeLayout) -> NodeLayout:
    """Without the NICs far below the fastest, which a note names."""
    fastest = max(layout.nic_GBps.values(), default=0.0)
    slow = {name: speed for name, speed in layout.nic_GBps.items() if speed < MIN_NIC_SHARE * fastest}
    if not slow:
        return layout
    vertices = [v for v in layout.topology.vertices if v.name not in slow]
    links = [link for link in layout.topology.full_links if link.source not in slow and link.target not in slow]
    named = ", ".join(f"{name.removeprefix('node0/')} ({speed * 8:g} Gb/s)" for name, speed in slow.items())
    note = f"left out, slower than half of the fastest NIC ({fastest * 8:g} Gb/s), so no traffic of ranks (nor NCCL's): {named}"
    kept = {name: speed for name, speed in layout.nic_GBps.items() if name not in slow}
    return NodeLayout(Topology.build(layout.topology.name, vertices, links), kept, (*layout.notes, note))


def vertices_of_kind(topology: Topology, kind: str) -> list[Vertex]:
    """In the topology's order."""
    return [v for v in topology.vertices if v.kind == kind]


def read_text(path: Path) -> str:
    """The file as text. Raises `ScaleMoEError` when it cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScaleMoEError(f"{path}: not a text file", found=f"byte {error.start} is not UTF-8") from error


def error_at(path: Path, line: int, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
    """The error to raise about one line of a file."""
    return ScaleMoEError(problem, found=found, try_=try_, place=f"{path}:{line}")
