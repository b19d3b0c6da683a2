"""A whole cluster: the same node layout on every host of a Slurm fabric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders.parts import MAX_LINKS, SWITCH_HOP_US, Parts
from megatron_scalemoe.topology.discover.layout import NodeLayout, slot_GBps, usual_nic_GBps, vertices_of_kind
from megatron_scalemoe.topology.discover.slurm import Fabric, Switch
from megatron_scalemoe.topology.graph import Topology, UnreachableError


def cluster_of(layout: NodeLayout, fabric: Fabric, *, hosts: Sequence[str] | None = None, oversubscription: float = 1.0) -> Topology:
    """Node i is the i-th host: of `hosts` (a job's nodes, in rank order), else of the fabric. Its vertices are `node{i}/..`.

    The NICs of a host that hangs on several leaves are dealt to them in turn: rails are leaves with all hosts each. The link between two
    switches is as wide as all that hangs below, divided by `oversubscription` and by the number of switches above. A NIC is as fast as its
    slot and its leaf's `LinkSpeed` allow; if its own speed is not known, as fast as `LinkSpeed`, or as is usual in its slot.

    Raises `ScaleMoEError` when a host is not in the fabric, the layout has no NIC, or hosts cannot reach each other.
    """
    chosen = tuple(dict.fromkeys(fabric.hosts if hosts is None else hosts))
    _check(layout, fabric, chosen, oversubscription)
    parts = Parts()
    number_of = {host: number for number, host in enumerate(chosen)}
    for number in number_of.values():
        _add_node(parts, layout, number)
    below_GBps = _add_leaf_links(parts, layout, fabric, number_of)
    _add_switch_links(parts, fabric, below_GBps, oversubscription)
    try:
        return Topology.build(f"{fabric.path.stem}, {len(chosen)} x {layout.topology.name}", parts.vertices, parts.links)
    except UnreachableError as error:
        problem = f"{fabric.path}: {error.problem}: their switches do not hang together"
        raise ScaleMoEError(problem, try_="--hosts with the nodes of one partition, or a switch above all") from error


def _check(layout: NodeLayout, fabric: Fabric, hosts: Sequence[str], oversubscription: float) -> None:
    unknown = sorted(set(hosts) - set(fabric.hosts))
    if unknown:
        raise ScaleMoEError(f"{fabric.path}: expected all hosts of the job in the file", found=f"not there: {', '.join(unknown[:5])}")
    if not vertices_of_kind(layout.topology, "nic"):
        problem = "a node on a network needs a NIC, and the node's layout has none"
        raise ScaleMoEError(problem, try_="NCCL's topology XML (it lists Ethernet too), or `topology build p4d --nodes 1` for --node")
    if not (math.isfinite(oversubscription) and oversubscription > 0):
        raise ScaleMoEError("--oversubscription must be a finite number above 0", found=oversubscription)
    if len(hosts) * len(layout.topology.links) > MAX_LINKS:
        problem = f"a cluster of at most {MAX_LINKS} links"
        raise ScaleMoEError(problem, found=f"{len(hosts)} hosts x {len(layout.topology.links)}", try_="--hosts with the job's nodes")


def _node_name(name: str, node: int) -> str:
    return f"node{node}/{name.removeprefix('node0/')}"


def _add_node(parts: Parts, layout: NodeLayout, node: int) -> None:
    for vertex in layout.topology.vertices:
        parts.vertex(_node_name(vertex.name, node), vertex.kind, node)
    for link in layout.topology.full_links:
        parts.links.append(link._replace(source=_node_name(link.source, node), target=_node_name(link.target, node)))


def _add_leaf_links(parts: Parts, layout: NodeLayout, fabric: Fabric, number_of: Mapping[str, int]) -> dict[str, float]:
    """Links each NIC to a leaf of its host. Returns the bandwidth below each leaf that has any."""
    leaves_of: dict[str, list[Switch]] = {host: [] for host in number_of}
    for switch in fabric.switches:
        for host in dict.fromkeys(switch.hosts):
            if host in leaves_of:
                leaves_of[host].append(switch)
    below_GBps: dict[str, float] = {}
    for host, leaves in leaves_of.items():
        for i, nic in enumerate(vertices_of_kind(layout.topology, "nic")):
            leaf = leaves[i % len(leaves)]
            if leaf.name not in below_GBps:
                parts.vertex(leaf.name, "switch")
            slot = slot_GBps(layout.topology, nic.name)
            nic_GBps = min(slot, layout.nic_GBps.get(nic.name, leaf.port_GBps or usual_nic_GBps(slot)))
            bandwidth = min(nic_GBps, leaf.port_GBps or nic_GBps)
            parts.cable(_node_name(nic.name, number_of[host]), leaf.name, bandwidth, SWITCH_HOP_US)
            below_GBps[leaf.name] = below_GBps.get(leaf.name, 0.0) + bandwidth
    return below_GBps


def _add_switch_links(parts: Parts, fabric: Fabric, below_GBps: dict[str, float], oversubscription: float) -> None:
    """Upwards, as `fabric.switches` has children first; switches that lead to no chosen host are left out."""
    parents: dict[str, int] = {}
    for switch in fabric.switches:
        for child in dict.fromkeys(switch.switches):
            parents[child] = parents.get(child, 0) + 1
    for switch in fabric.switches:
        for child in dict.fromkeys(switch.switches):
            if child in below_GBps:
                if switch.name not in below_GBps:
                    parts.vertex(switch.name, "switch")
                bandwidth = below_GBps[child] / oversubscription / parents[child]
                parts.cable(switch.name, child, bandwidth, SWITCH_HOP_US)
                below_GBps[switch.name] = below_GBps.get(switch.name, 0.0) + bandwidth
