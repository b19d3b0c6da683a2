"""Reads NCCL's topology XML, written where NCCL_TOPO_DUMP_FILE says: one machine, or one NVLink domain of several (GB200 NVL72).

    <system><cpu numaid arch vendor familyid modelid>            a NUMA node
      <pci busid link_speed="16.0 GT/s PCIe" link_width="16">    a PCIe device or switch, with its link upwards; may hold <pci>
        <gpu dev sm rank> <nvlink target count tclass/> <c2c bw count/> </gpu>
        <nic> <net name dev speed/> </nic>                       speed in Mb/s; <nic> may stand under <cpu> too (virtual NICs)

The elements and attributes are those that NCCL reads back (src/graph/xml.cc, topo.cc). Bandwidths are the standards' and data sheets', as
in the builders, not NCCL's own lower estimates; only between sockets are its figures taken (topo.h), as they tell processors apart.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_scalemoe.topology.builders.machines import SOCKET_GBps
from megatron_scalemoe.topology.builders.parts import NVLINK_HOP_US, Parts, PCIE3_GBps
from megatron_scalemoe.topology.discover.layout import (
    GPU_HOP_US,
    GPU_MODELS,
    INNER_HOP_US,
    LEAVE_SWITCH_US,
    NIC_HOP_US,
    NodeLayout,
    layout_of_parts,
)
from megatron_scalemoe.topology.discover.xml_tree import Element, read_xml

# PCI classes of an nvlink's other end.
_NVSWITCH_CLASS, _GPU_CLASS, _CPU_CLASS = "0x068000", "0x03", "0x068001"
# From compute capability (times 10) on: the row of GPU_MODELS. 8.6 and 8.9 are RTX and A40.
_MODEL_OF_SM = {100: "b200", 90: "h100", 86: "a6000", 80: "a100", 75: "2080ti", 70: "v100", 0: "p100"}
# NCCL takes 10 Gb/s where a NIC's speed is unknown, 16 lanes where a link's width is.
_UNKNOWN_NET_MBPS, _UNKNOWN_WIDTH = 10_000, 16
_INTEL_SOCKET_GBps = {0xCF: 40.0, 0x8F: 22.0, 0x55: 10.0, 0: 6.0}
_AMD_SOCKET_GBps = {26: 32.0, 25: 24.0, 0: 16.0}


def read_nccl_xml(path: Path) -> NodeLayout:
    """The machine of a dump. Ranks in the order of the `rank` attributes if all GPUs have one, else of machine and `dev`.

    Raises `ScaleMoEError` naming file and line.
    """
    root = read_xml(path, "system")
    gpus = _ordered_gpus(root)
    parts, notes = Parts(), []
    machines = len({cpu.get("host_hash") for cpu in root.iterchildren("cpu")})
    if machines > 1:
        notes.append(f"the file holds {machines} machines of one NVLink domain: taken as one node")
    names = {gpu: parts.vertex(f"node0/gpu{rank}", "gpu", 0) for rank, gpu in enumerate(gpus)}
    tree = _PcieTree(parts, names, notes)
    cpus = root.findall("cpu")
    for cpu in cpus:
        tree.add_cpu(cpu)
    for one, other in itertools.combinations(cpus, 2):
        if one.get("host_hash") == other.get("host_hash"):
            parts.cable(tree.name_of[one], tree.name_of[other], min(map(_socket_GBps, (one, other))), INNER_HOP_US)
    _add_nvlinks(parts, gpus, names, notes)
    notes += _unread(root)
    return layout_of_parts(path, parts, tree.nic_GBps, notes)


def _ordered_gpus(root: Element) -> list[Element]:
    gpus = [gpu for cpu in root.iterchildren("cpu") for gpu in cpu.iter("gpu")]
    if not gpus:
        raise root.error("expected <gpu> elements in <cpu> and <pci>", try_="the file that NCCL_TOPO_DUMP_FILE names, after a job on GPUs")
    for gpu in gpus:
        if gpu.getparent().tag != "pci":
            raise gpu.error("must stand in a <pci>", found=f"in <{gpu.getparent().tag}>")
    if all("rank" in gpu.attrib for gpu in gpus):
        return sorted(gpus, key=lambda gpu: gpu.integer("rank"))
    host = {gpu: number for number, cpu in enumerate(_by_host(root)) for gpu in cpu}
    return sorted(gpus, key=lambda gpu: (host[gpu], gpu.integer("dev")))


def _by_host(root: Element) -> list[list[Element]]:
    """The GPUs of each machine; machines in the file's order."""
    hosts: dict[str | None, list[Element]] = {}
    for cpu in root.iterchildren("cpu"):
        hosts.setdefault(cpu.get("host_hash"), []).extend(cpu.iter("gpu"))
    return list(hosts.values())


class _PcieTree:
    """Collects the vertices and PCIe links below the NUMA nodes, and the NICs' speeds."""

    def __init__(self, parts: Parts, gpu_names: dict[Element, str], notes: list[str]):
        self.parts, self.gpu_names, self.notes = parts, gpu_names, notes
        self.name_of: dict[Element, str] = {}
        self.nic_GBps: dict[str, float] = {}
        self.counts = {"cpu": 0, "pcie": 0, "nic": 0}

    def add_cpu(self, cpu: Element) -> None:
        name = self.name_of[cpu] = self._new("cpu", "node")
        for child in cpu.iterchildren("pci", "nic"):
            if child.tag == "nic":
                self._add_nic(child, name, math.inf)
            else:
                self._add_pci(child, name)
        for gpu in cpu.iter("gpu"):
            # Grace: the GPU's own link to the processor, and the way to its NICs. `bw` in MB/s per link.
            bandwidth = sum(c2c.integer("bw") * c2c.integer("count", 1) for c2c in gpu.iterchildren("c2c")) / 1e3
            if bandwidth:
                self._add_c2c(self.gpu_names[gpu], name, bandwidth)

    def _add_pci(self, pci: Element, parent: str) -> None:
        bandwidth = _pcie_GBps(pci)
        for gpu in pci.iterchildren("gpu"):
            self.parts.cable(self.gpu_names[gpu], parent, bandwidth, GPU_HOP_US)
        for nic in pci.iterchildren("nic"):
            self._add_nic(nic, parent, bandwidth)
        below = [child for child in pci.iterchildren("pci") if next(child.iter("gpu", "net"), None) is not None]
        if below:
            name = self._new("pcie", "switch")
            holds_device = any(child.find("gpu") is not None or child.find("nic") is not None for child in below)
            self.parts.cable(name, parent, bandwidth, LEAVE_SWITCH_US if holds_device else INNER_HOP_US)
            for child in below:
                self._add_pci(child, name)

    def _add_nic(self, nic: Element, parent: str, pcie_GBps: float) -> None:
        """One vertex for all ports (`net`) of a NIC."""
        mbps = 0
        for net in nic.iterchildren("net"):
            speed = net.integer("speed", 0)
            if speed <= 0:
                speed = _UNKNOWN_NET_MBPS
                self.notes.append(f"line {net.sourceline}: the speed of {net.get('name', 'a net')} is not known: taken 10 Gb/s")
            mbps += speed
        if mbps:
            name = self._new("nic", "nic")
            self.nic_GBps[name] = mbps / 8e3
            # A NIC right under <cpu> is virtual; nothing is known of its slot.
            self.parts.cable(name, parent, mbps / 8e3 if math.isinf(pcie_GBps) else pcie_GBps, NIC_HOP_US)

    def _add_c2c(self, gpu: str, cpu: str, bandwidth_GBps: float) -> None:
        self.parts.links = [link for link in self.parts.links if {link.source, link.target} != {gpu, cpu}]
        self.parts.cable(gpu, cpu, bandwidth_GBps, GPU_HOP_US)

    def _new(self, what: str, kind: str) -> str:
        self.counts[what] += 1
        return self.parts.vertex(f"node0/{what}{self.counts[what] - 1}", kind, 0)


def _unread(root: Element) -> Iterator[str]:
    """What the file holds and the layout does not."""
    if (link := next(root.iter("xgmi"), None)) is not None:
        yield f"line {link.sourceline}: <xgmi> links (RCCL, AMD) are not read: these GPUs are taken as linked over PCIe only"
    ports: set[tuple] = set()
    for net in root.iter("net"):
        card = net.getparent().getparent()
        port = _host(card), card.get("busid", "").rpartition(".")[0], net.get("port")
        if card.tag == "pci" and port in ports:
            text = "if they are virtual functions, they share one port (--nic-Gbps sets each NIC's speed)"
            yield f"line {net.sourceline}: several networks on port {port[2]} of the card {port[1]}, counted as ports of their own: {text}"
            return
        ports.add(port)


def _add_nvlinks(parts: Parts, gpus: list[Element], names: dict[Element, str], notes: list[str]) -> None:
    """NVSwitches become one vertex: their planes never block each other. Links between two GPUs are given at both, and counted once. NCCL
    writes all links of a GPU: those to a GPU that is no rank here (or itself, or a processor) are left out."""
    at_bus = {(_host(gpu), gpu.getparent().required("busid").lower()): names[gpu] for gpu in gpus}
    to_switch: dict[str, float] = {}
    direct: dict[tuple[str, str], float] = {}
    outside: list[Element] = []
    for gpu in gpus:
        name = names[gpu]
        for link in gpu.iterchildren("nvlink"):
            bandwidth = link.integer("count") * _nvlink_GBps(gpu)
            tclass, target = link.required("tclass"), link.required("target").lower()
            if bandwidth <= 0:
                raise link.error("attribute 'count' must be 1 or more", found=link.integer("count"))
            if tclass == _NVSWITCH_CLASS:
                to_switch[name] = to_switch.get(name, 0.0) + bandwidth
            elif tclass.startswith((_GPU_CLASS, _CPU_CLASS)):
                pair = name, at_bus.get((_host(gpu), target), name)
                if pair == (name, name):
                    outside.append(link)
                else:
                    direct[pair] = direct.get(pair, 0.0) + bandwidth
            else:
                raise link.error(
                    f"attribute 'tclass' must be {_NVSWITCH_CLASS} (NVSwitch) or {_GPU_CLASS}.. (GPU)", found=repr(tclass[:80])
                )
    if outside:
        first = f"line {outside[0].sourceline}: NVLink to {outside[0].get('target')[:40]}"
        more = f" and {len(outside) - 1} more" if len(outside) > 1 else ""
        notes.append(f"{first}{more}: the other end is no rank of this file: left out")
    if to_switch:
        switch = parts.vertex("node0/nvswitch", "switch", 0)
        for name, bandwidth in to_switch.items():
            parts.cable(name, switch, bandwidth, NVLINK_HOP_US)
    for one, other in dict.fromkeys(tuple(sorted(pair)) for pair in direct):
        bandwidth = max(direct.get((one, other), 0.0), direct.get((other, one), 0.0))
        parts.links = [link for link in parts.links if {link.source, link.target} != {one, other}]
        parts.cable(one, other, bandwidth, 2 * NVLINK_HOP_US)


def _host(element: Element) -> str | None:
    while element.getparent() is not None and element.getparent().tag != "system":
        element = element.getparent()
    return element.get("host_hash")


def _pcie_GBps(pci: Element) -> float:
    """GT/s per lane and direction, x lanes / 8: 16.0 GT/s x16 = 32 GB/s, as the PCI-SIG counts. Generation 3 where the speed is missing."""
    width = pci.integer("link_width", 0) or _UNKNOWN_WIDTH
    if not 1 <= width <= 32:
        raise pci.error("attribute 'link_width' must be 1 to 32", found=width)
    match = re.match(r"([0-9]{1,3}(?:\.[0-9]{1,3})?) GT/s", pci.get("link_speed", ""))
    per_lane = float(match.group(1)) / 8 if match else 0.0
    return width * (per_lane or PCIE3_GBps / 16)


def _nvlink_GBps(gpu: Element) -> float:
    sm = gpu.integer("sm")
    model = next((model for lowest, model in _MODEL_OF_SM.items() if sm >= lowest), None)
    if model is None:
        raise gpu.error("attribute 'sm' must be 0 or more", found=sm)
    return GPU_MODELS[model].nvlink_GBps


def _socket_GBps(cpu: Element) -> float:
    vendor = cpu.get("vendor")
    if vendor == "GenuineIntel":
        model = cpu.integer("modelid", 0)
        return next((figure for lowest, figure in _INTEL_SOCKET_GBps.items() if model >= lowest), SOCKET_GBps)
    if vendor == "AuthenticAMD":
        family = cpu.integer("familyid", 0)
        return next((figure for lowest, figure in _AMD_SOCKET_GBps.items() if family >= lowest), SOCKET_GBps)
    return SOCKET_GBps
