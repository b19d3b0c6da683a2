"""What people want to know of a topology at a glance: classes of rank pairs, equal nodes, and what looks wrong."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import NamedTuple

import numpy as np

from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.topology.routes import Routes

# Links of one kind differ by this factor at most, ports (of ranks, of nodes) are no slower than this share of the usual one.
MAX_LINK_RATIO = 10.0
MIN_PORT_SHARE = 0.75
# Above so many ranks, bandwidths of pairs are taken from a few source ranks.
_ALL_PAIRS_RANKS, _SAMPLED_RANKS = 128, 16


class PairClass(NamedTuple):
    """Rank pairs of equal latency, all inside nodes or all between them. `bandwidth_GBps`: smallest and largest of a pair alone."""

    same_node: bool
    latency_us: float
    pairs: int
    bandwidth_GBps: tuple[float, float]
    example: tuple[int, int]


class NodeClass(NamedTuple):
    """Consecutive nodes (`first` to `last`) whose ports are equal; the slower direction of each, the slowest rank. `inf`: no such port."""

    first: int
    last: int
    ranks_per_node: int
    scale_up_GBps: float
    scale_out_GBps: float
    node_GBps: float


class Finding(NamedTuple):
    """Something suspicious. `check`: which of CHECKS found it; `where`: the link, vertex, rank or node."""

    check: str
    where: str
    problem: str


CHECKS = {
    "reachable": "every GPU reaches every other",
    "symmetric": "links are equal in both directions",
    "slow link": f"no link is {MAX_LINK_RATIO:.0f}x slower than its kind",
    "slow port": f"no rank or node is below {MIN_PORT_SHARE:.0%} of the usual bandwidth",
    "equal nodes": "all nodes have as many GPUs",
    "idle NIC": "every NIC carries traffic",
}


def pair_classes(topology: Topology, routes: Routes) -> list[PairClass]:
    """All rank pairs by place and latency, the nearest first. Above 128 ranks, bandwidths are those from 16 ranks."""
    ranks = topology.num_ranks
    if ranks <= _ALL_PAIRS_RANKS:
        sources, bandwidth_SG = np.arange(ranks), routes.bandwidth_GBps
    else:
        sources = np.linspace(0, ranks - 1, _SAMPLED_RANKS).astype(int)
        bandwidth_SG = np.stack([routes.bandwidth_from(rank) for rank in sources])
    same_node_GG = topology.node_of_rank[:, None] == topology.node_of_rank
    classes = []
    for same_node in (True, False):
        chosen_GG = (same_node_GG == same_node) & ~np.eye(ranks, dtype=bool)
        for latency_us in np.unique(routes.latency_us[chosen_GG]):
            members_GG = chosen_GG & (routes.latency_us == latency_us)
            source, target = np.argwhere(members_GG)[0]
            bandwidth = bandwidth_SG[members_GG[sources]]
            if not bandwidth.size:  # none of the sampled ranks has such a pair
                bandwidth = routes.bandwidth_from(source)[members_GG[source]]
            span = (float(bandwidth.min()), float(bandwidth.max()))
            classes.append(PairClass(same_node, float(latency_us), int(members_GG.sum()), span, (int(source), int(target))))
    return classes


def node_classes(ports: Ports) -> list[NodeClass]:
    """The nodes in order, runs of equal ones as one row."""
    classes: list[NodeClass] = []
    for node in range(ports.num_nodes):
        ranks = ports.node_of_rank == node
        row = NodeClass(
            node,
            node,
            int(ranks.sum()),
            *(float(min(into[ranks].min(), out[ranks].min())) for into, out in zip(ports.into[:2], ports.out[:2], strict=True)),
            float(min(ports.into.node_GBps[node], ports.out.node_GBps[node])),
        )
        if classes and classes[-1][2:] == row[2:]:
            row = classes.pop()._replace(last=node)
        classes.append(row)
    return classes


def find_suspicious(topology: Topology, routes: Routes, ports: Ports) -> list[Finding]:
    """What looks like a typing error or a broken link, in the order of CHECKS. (A topology whose GPUs cannot reach each other never gets
    here: it cannot be built.)"""
    return [*_asymmetric(topology), *_slow_links(topology), *_slow_ports(ports), *_unequal_nodes(topology), *_idle_nics(topology, routes)]


def _asymmetric(topology: Topology) -> list[Finding]:
    found = []
    edges = topology.graph.edges
    for source, target in topology.links:
        if (target, source) not in edges:
            found.append(Finding("symmetric", f"{source}->{target}", "there is no link back"))
        elif source < target:
            for key in ("bandwidth_GBps", "latency_us"):
                there, back = edges[source, target][key], edges[target, source][key]
                if not np.isclose(there, back, rtol=0.01):
                    found.append(Finding("symmetric", f"{source}->{target}", f"{key} {there:g} there, {back:g} back"))
    return found


def _slow_links(topology: Topology) -> list[Finding]:
    """Siblings are links between the same kinds of vertices, both inside a node, both out of it, or both in the fabric."""
    node_of = dict(topology.graph.nodes(data="node"))
    kind_of = dict(topology.graph.nodes(data="kind"))
    siblings = defaultdict(list)
    for index, (u, v) in enumerate(topology.links):
        place = "fabric" if node_of[u] is None and node_of[v] is None else "inside" if node_of[u] == node_of[v] else "out"
        siblings[frozenset((kind_of[u], kind_of[v])), place].append(index)
    found = []
    for links in siblings.values():
        usual = float(np.median(topology.bandwidth_GBps[links]))
        for index in links:
            bandwidth = topology.bandwidth_GBps[index]
            if bandwidth * MAX_LINK_RATIO <= usual:
                found.append(Finding("slow link", "->".join(topology.links[index]), f"{bandwidth:g} GB/s, its kind has {usual:g}"))
    return found


def _slow_ports(ports: Ports) -> list[Finding]:
    """The nodes first; ranks between which and other nodes traffic is slow only where their node does not say it already."""
    found, slow_ranks = [], set()
    for kind, direction in itertools.product(("node", "scale_out", "scale_up"), ("in", "out")):
        name, side = f"{kind}_{direction}", ports.into if direction == "in" else ports.out
        capacity = getattr(side, f"{kind}_GBps")
        limited = capacity[np.isfinite(capacity)]
        usual = float(np.median(limited)) if limited.size else 0.0
        for index in np.flatnonzero(capacity < MIN_PORT_SHARE * usual):
            problem = f"{name} {capacity[index]:g} GB/s, usual is {usual:g}"
            if name.startswith("node"):
                slow_ranks |= set(np.flatnonzero(ports.node_of_rank == index))
                found.append(Finding("slow port", f"node {index}", problem))
            elif name.startswith("scale_up") or index not in slow_ranks:
                found.append(Finding("slow port", f"rank {index}", problem))
    return found


def _unequal_nodes(topology: Topology) -> list[Finding]:
    sizes = np.bincount(topology.node_of_rank)
    usual = int(np.median(sizes))
    return [Finding("equal nodes", f"node {n}", f"{sizes[n]} GPUs, usual is {usual}") for n in np.flatnonzero(sizes != usual)]


def _idle_nics(topology: Topology, routes: Routes) -> list[Finding]:
    if topology.num_nodes == 1:
        return []
    load_M = routes.link_load(np.ones((topology.num_ranks, topology.num_ranks)))
    busy = {name for link, load in zip(topology.links, load_M, strict=True) if load for name in link}
    idle = [v.name for v in topology.vertices if v.kind == "nic" and v.name not in busy]
    return [Finding("idle NIC", name, "no route between ranks passes it") for name in idle]
