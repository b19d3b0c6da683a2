"""From a `nvidia-smi topo -m` matrix to vertices and links: the PCIe tree that the distances imply, and NVLinks on top.

The classes PIX < PXB < PHB < NODE < SYS are distances in a tree (PCIe switch, several, root complex, NUMA node, machine), so devices at
most so far from each other form the groups of each level. Between GPUs, `NV#` hides the distance; their NICs or NUMA nodes tell it then.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import networkx as nx

from megatron_scalemoe.topology.builders.machines import SOCKET_GBps
from megatron_scalemoe.topology.builders.parts import NVLINK_HOP_US, Parts
from megatron_scalemoe.topology.discover.layout import GPU_HOP_US, INNER_HOP_US, LEAVE_SWITCH_US, NIC_HOP_US, GpuModel

Cells = Sequence[Sequence[str]]
# A machine has 8 to 16 GPUs and some 20 NICs.
MAX_DEVICES = 256
# What a group of each class hangs on: name and kind of the vertex.
_LEVELS = {"PIX": ("pcie", "switch"), "PXB": ("pcie", "switch"), "PHB": ("bridge", "node"), "NODE": ("cpu", "node")}


def add_pcie_tree(devices: Sequence[str], cells: Cells, numa: Sequence[int | None], pcie_GBps: float) -> tuple[Parts, list[str]]:
    """Vertices `node0/gpu0..`, `node0/nic0..` (any device that is no GPU) in the matrix's order, and PCIe. Every device ends at a NUMA node
    `node0/cpu0..`; these are linked to each other. Returns the parts, and the vertex of each device."""
    parts = Parts()
    counts = dict.fromkeys(("gpu", "nic", "pcie", "bridge", "cpu"), 0)

    def add(what: str, kind: str) -> str:
        counts[what] += 1
        return parts.vertex(f"node0/{what}{counts[what] - 1}", kind, 0)

    names = [add(kind, kind) for kind in ("gpu" if device.startswith("GPU") else "nic" for device in devices)]
    hop_us = {name: GPU_HOP_US if "/gpu" in name else NIC_HOP_US for name in names}
    width = dict.fromkeys(names, 1)  # links of a PCIe slot that a vertex has towards the next level
    top = list(names)
    near: set[str] = set()
    for level, (what, kind) in _LEVELS.items():
        near.add(level)
        for group in _groups(cells, numa, near):
            children = list(dict.fromkeys(top[i] for i in group))
            if len(children) == 1 and what != "cpu":
                continue
            parent = add(what, kind)
            for child in children:
                parts.cable(child, parent, width[child] * pcie_GBps, hop_us[child])
            # A PCIe switch shares one slot; a root complex has one for each device.
            width[parent] = 1 if kind == "switch" else sum(width[child] for child in children)
            hop_us[parent] = LEAVE_SWITCH_US if kind == "switch" and set(children) & set(names) else INNER_HOP_US
            for i in group:
                top[i] = parent
    for one, other in itertools.combinations(dict.fromkeys(top), 2):
        parts.cable(one, other, SOCKET_GBps, INNER_HOP_US)
    return parts, names


def _groups(cells: Cells, numa: Sequence[int | None], near: set[str]) -> list[list[int]]:
    """Devices connected by cells of the classes in `near`, each group sorted, in order of its first device."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(cells)))
    graph.add_edges_from((i, j) for i, j in itertools.combinations(range(len(cells)), 2) if cells[i][j] in near)
    if "NODE" in near:
        # Where NVLink hides the distance of two GPUs: the same NUMA node joins them, and nothing known at all does too.
        has_nic = any(cell in _LEVELS or cell == "SYS" for row in cells for cell in row)
        for i, j in itertools.combinations(range(len(cells)), 2):
            unknown = numa[i] is None and numa[j] is None and not has_nic
            if cells[i][j].startswith("NV") and (unknown or (numa[i] is not None and numa[i] == numa[j])):
                graph.add_edge(i, j)
    return sorted(sorted(group) for group in nx.connected_components(graph))


def add_nvlinks(parts: Parts, names: Sequence[str], cells: Cells, model: GpuModel) -> None:
    """GPUs that see more NVLinks than the model has see them through NVSwitch; the others are linked directly."""
    counts = [[int(cell[2:]) if cell.startswith("NV") else 0 for cell in row] for row in cells]
    graph = nx.Graph()
    graph.add_edges_from((i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if count)
    for number, group in enumerate(sorted(sorted(group) for group in nx.connected_components(graph))):
        if max(sum(counts[i]) for i in group) > model.nvlinks:
            switch = parts.vertex(f"node0/nvswitch{number or ''}", "switch", 0)
            for i in group:
                parts.cable(names[i], switch, max(counts[i]) * model.nvlink_GBps, NVLINK_HOP_US)
        else:
            for i, j in itertools.combinations(group, 2):
                if counts[i][j]:
                    parts.cable(names[i], names[j], counts[i][j] * model.nvlink_GBps, 2 * NVLINK_HOP_US)
