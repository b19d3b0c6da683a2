"""Clusters of NVSwitch nodes with a NIC per GPU, under the three usual fabrics: rail-optimised, fat tree, dragonfly."""

from __future__ import annotations

from megatron_scalemoe.topology.builders.parts import (
    SWITCH_HOP_US,
    HDR_GBps,
    NDR_GBps,
    NVLINK3_GBps,
    NVLINK4_GBps,
    Parts,
    PCIE4_GBps,
    PCIE5_GBps,
    add_nics,
    builder,
    nvswitch_node,
)

# HPE Slingshot: about 350 ns per switch; cables between groups add some 100 m x 5 ns.
SLINGSHOT_HOP_US, GLOBAL_HOP_US = 0.35, 0.85


@builder
def rail_optimized(
    *,
    nodes: int = 4,
    gpus_per_node: int = 8,
    nodes_per_leaf: int = 32,
    spines: int = 4,
    oversubscription: float = 1.0,
    scale_up_GBps: float = NVLINK4_GBps,
    scale_out_GBps: float = NDR_GBps,
) -> Parts:
    """DGX H100 SuperPOD: NIC i of up to 32 nodes meet at leaf switch (rail) i; between rails and groups of nodes, traffic climbs to a
    spine. oversubscription: a leaf's bandwidth down, divided by its bandwidth up."""
    parts = Parts()
    spine_names = [parts.vertex(f"spine{i}", "switch") for i in range(spines)]
    uplink_GBps = min(nodes, nodes_per_leaf) * scale_out_GBps / spines / oversubscription
    leaves: list[str] = []
    for node in range(nodes):
        if node % nodes_per_leaf == 0:
            leaves = [_leaf(parts, f"group{node // nodes_per_leaf}/rail{i}", spine_names, uplink_GBps) for i in range(gpus_per_node)]
        gpus = nvswitch_node(parts, node, gpus_per_node, scale_up_GBps)
        for nic, leaf in zip(add_nics(parts, node, gpus, max(PCIE5_GBps, scale_out_GBps)), leaves, strict=True):
            parts.cable(nic, leaf, scale_out_GBps, SWITCH_HOP_US)
    return parts


@builder
def fat_tree(
    *,
    nodes: int = 4,
    gpus_per_node: int = 8,
    nodes_per_leaf: int = 4,
    spines: int = 4,
    oversubscription: float = 1.0,
    scale_up_GBps: float = NVLINK4_GBps,
    scale_out_GBps: float = NDR_GBps,
) -> Parts:
    """Two levels: all NICs of a few nodes meet at one leaf switch, leaves at the spines. oversubscription: a leaf's bandwidth down,
    divided by its bandwidth up (1, 2 and 4 are usual)."""
    parts = Parts()
    spine_names = [parts.vertex(f"spine{i}", "switch") for i in range(spines)]
    uplink_GBps = min(nodes, nodes_per_leaf) * gpus_per_node * scale_out_GBps / spines / oversubscription
    leaf = ""
    for node in range(nodes):
        if node % nodes_per_leaf == 0:
            leaf = _leaf(parts, f"leaf{node // nodes_per_leaf}", spine_names, uplink_GBps)
        gpus = nvswitch_node(parts, node, gpus_per_node, scale_up_GBps)
        for nic in add_nics(parts, node, gpus, max(PCIE5_GBps, scale_out_GBps)):
            parts.cable(nic, leaf, scale_out_GBps, SWITCH_HOP_US)
    return parts


def _leaf(parts: Parts, name: str, spines: list[str], uplink_GBps: float) -> str:
    leaf = parts.vertex(name, "switch")
    for spine in spines:
        parts.cable(leaf, spine, uplink_GBps, SWITCH_HOP_US)
    return leaf


@builder
def dragonfly(
    *,
    groups: int = 4,
    routers_per_group: int = 4,
    nodes_per_router: int = 1,
    gpus_per_node: int = 4,
    scale_up_GBps: float = NVLINK3_GBps,
    scale_out_GBps: float = HDR_GBps,
    local_GBps: float = HDR_GBps,
    global_GBps: float = 4 * HDR_GBps,
) -> Parts:
    """Kim et al., ISCA'08, with Slingshot's 200 Gb/s ports: the routers of a group are linked all to all (`local_GBps` each), each pair of
    groups by one bundle (`global_GBps`), spread over the routers. Routes are minimal: at most local, global, local."""
    parts = Parts()
    routers = [[parts.vertex(f"group{g}/router{r}", "switch") for r in range(routers_per_group)] for g in range(groups)]
    for group in routers:
        for i, router in enumerate(group):
            for other in group[:i]:
                parts.cable(router, other, local_GBps, SLINGSHOT_HOP_US)
    for g in range(groups):
        for h in range(g):
            # Group g numbers its other groups 0..groups-2; bundle k leaves from router k, cyclically.
            parts.cable(routers[g][h % routers_per_group], routers[h][(g - 1) % routers_per_group], global_GBps, GLOBAL_HOP_US)
    in_order = [router for group in routers for router in group for _ in range(nodes_per_router)]
    for node, router in enumerate(in_order):
        gpus = nvswitch_node(parts, node, gpus_per_node, scale_up_GBps)
        for nic in add_nics(parts, node, gpus, max(PCIE4_GBps, scale_out_GBps)):
            parts.cable(nic, router, scale_out_GBps, SLINGSHOT_HOP_US)
    return parts
