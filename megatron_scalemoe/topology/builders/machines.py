"""Real machines: DGX nodes, GB200 NVL72 racks, AWS p4d, and PCIe boxes. Each node's GPUs come in rank order."""

from __future__ import annotations

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders.parts import (
    GBIT_IN_GB,
    NVLINK_HOP_US,
    SWITCH_HOP_US,
    HDR_GBps,
    NDR_GBps,
    NVLINK3_GBps,
    NVLINK4_GBps,
    NVLINK5_GBps,
    Parts,
    PCIE3_GBps,
    PCIE4_GBps,
    PCIE5_GBps,
    add_nics,
    builder,
    nvswitch_node,
)

# An NVLink bridge joins two RTX A6000: 112.5 GB/s both directions together (data sheet; FSMoE, ASPLOS'25, testbed A).
A6000_BRIDGE_GBps = 112.5 / 2
# Between two CPU sockets: 180 Gb/s, as measured for FasterMoE's simulator (PPoPP'22, artifact).
SOCKET_GBps = 180 * GBIT_IN_GB
# PCIe: 2-5 us from GPU to GPU; two hops to one switch, more across sockets.
PCIE_HOP_US = 1.0
# Makes 10 us between GPUs of two nodes over Ethernet, the upper end of RoCE figures (2-10 us).
ETHERNET_HOP_US = 3.0
# Per GPU model of FSMoE's testbeds (section 6.1): GPUs per node, PCIe, NVLink bridges, InfiniBand.
PCIE_BOXES = {"a6000": (8, PCIE4_GBps, A6000_BRIDGE_GBps, HDR_GBps), "2080ti": (4, PCIE3_GBps, None, HDR_GBps / 2)}


@builder
def dgx_a100() -> Parts:
    """One DGX A100: 8 GPUs on NVSwitch, each with an HDR NIC."""
    parts = Parts()
    add_nics(parts, 0, nvswitch_node(parts, 0, 8, NVLINK3_GBps), PCIE4_GBps)
    return parts


@builder
def dgx_h100() -> Parts:
    """One DGX H100: 8 GPUs on NVSwitch, each with an NDR NIC."""
    parts = Parts()
    add_nics(parts, 0, nvswitch_node(parts, 0, 8, NVLINK4_GBps), PCIE5_GBps)
    return parts


@builder
def nvl72(*, racks: int = 1, gpus_per_rack: int = 72, scale_up_GBps: float = NVLINK5_GBps, scale_out_GBps: float = NDR_GBps) -> Parts:
    """GB200 NVL72 racks: a rack is one NVLink domain, so one node here. With several, a NIC per GPU and a switch that does not block."""
    parts = Parts()
    fabric = parts.vertex("fabric", "switch") if racks > 1 else None
    for rack in range(racks):
        gpus = nvswitch_node(parts, rack, gpus_per_rack, scale_up_GBps)
        if fabric:
            for nic in add_nics(parts, rack, gpus, PCIE5_GBps):
                parts.cable(nic, fabric, scale_out_GBps, SWITCH_HOP_US)
    return parts


@builder
def p4d(*, nodes: int = 4, network_Gbps: float = 100.0) -> Parts:
    """AWS p4d.24xlarge nodes as in ScaleMoE (PACT'25): 8 A100 on NVSwitch, one Ethernet link per node that its GPUs share."""
    parts = Parts()
    ethernet = parts.vertex("ethernet", "switch")
    for node in range(nodes):
        host, nic = parts.vertex(f"node{node}/host", "node", node), parts.vertex(f"node{node}/nic0", "nic", node)
        for gpu in nvswitch_node(parts, node, 8, NVLINK3_GBps):
            parts.cable(gpu, host, PCIE4_GBps, PCIE_HOP_US)
        # The host's way to the NIC is made wide enough, for networks faster than the paper's too.
        parts.cable(host, nic, max(PCIE4_GBps, network_Gbps * GBIT_IN_GB), PCIE_HOP_US)
        parts.cable(nic, ethernet, network_Gbps * GBIT_IN_GB, ETHERNET_HOP_US)
    return parts


@builder
def pcie_box(*, gpu: str = "a6000", nodes: int = 1) -> Parts:
    """FSMoE's testbeds: `a6000` (8 per node, NVLink bridges between pairs) or `2080ti` (4 per node, no NVLink); one NIC per node.

    Two sockets, each with a PCIe switch for half of the GPUs; the NIC sits on the first socket.
    """
    if gpu not in PCIE_BOXES:
        raise ScaleMoEError(f"must be one of {', '.join(PCIE_BOXES)}", field=("parameters", "gpu"), found=repr(gpu))
    gpus, pcie_GBps, bridge_GBps, network_GBps = PCIE_BOXES[gpu]
    parts = Parts()
    infiniband = parts.vertex("infiniband", "switch") if nodes > 1 else None
    for node in range(nodes):
        hosts = [parts.vertex(f"node{node}/cpu{i}", "node", node) for i in range(2)]
        parts.cable(*hosts, SOCKET_GBps, PCIE_HOP_US)
        switches = [parts.vertex(f"node{node}/pcie{i}", "switch", node) for i in range(2)]
        for host, switch in zip(hosts, switches, strict=True):
            parts.cable(host, switch, pcie_GBps, PCIE_HOP_US)
        names = [parts.vertex(f"node{node}/gpu{i}", "gpu", node) for i in range(gpus)]
        for i, name in enumerate(names):
            parts.cable(name, switches[i * 2 // gpus], pcie_GBps, PCIE_HOP_US)
        for one, other in zip(names[::2], names[1::2], strict=True):
            if bridge_GBps:
                parts.cable(one, other, bridge_GBps, 2 * NVLINK_HOP_US)
        if infiniband:
            nic = parts.vertex(f"node{node}/nic0", "nic", node)
            parts.cable(hosts[0], nic, max(pcie_GBps, network_GBps), PCIE_HOP_US)
            parts.cable(nic, infiniband, network_GBps, SWITCH_HOP_US)
    return parts
