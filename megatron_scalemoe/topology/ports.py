"""`Ports`: the capacities through which traffic enters and leaves ranks and nodes.

A placement changes how many bytes cross each port, and only that; so solvers work on ports, which are few, and the links are for the
final word. Ports never overestimate: traffic needs at least the time of its busiest port, whatever the routes.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Ports:
    """Port capacities in GB/s (10^9 bytes/s), one direction each; `inf` where nothing limits. G ranks, N nodes.

    node_of_rank: int [G]. The others are float64:
    scale_up_in_GBps, scale_up_out_GBps: [G], between a rank and the other ranks of its node.
    scale_out_in_GBps, scale_out_out_GBps: [G], between a rank and the ranks of other nodes.
    node_in_GBps, node_out_GBps: [N], all traffic between a node and the other nodes (shared NICs).
    scale_up_latency_us, scale_out_latency_us: the largest latency between two ranks of one node, of different nodes (0 if none).
    """

    node_of_rank: np.ndarray
    scale_up_in_GBps: np.ndarray
    scale_up_out_GBps: np.ndarray
    scale_out_in_GBps: np.ndarray
    scale_out_out_GBps: np.ndarray
    node_in_GBps: np.ndarray
    node_out_GBps: np.ndarray
    scale_up_latency_us: float
    scale_out_latency_us: float

    @property
    def num_ranks(self) -> int:
        return self.node_of_rank.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.node_in_GBps.shape[0]


def two_level_ports(
    num_nodes: int,
    ranks_per_node: int,
    *,
    scale_up_GBps: float = 450.0,
    scale_out_GBps: float = 50.0,
    latency_us: tuple[float, float] = (1, 5),
) -> Ports:
    """Ports of equal nodes with a NIC per rank: what the builders' node-and-fabric topologies come to. For examples and tests."""
    ranks, nodes = num_nodes * ranks_per_node, num_nodes
    up, out = np.full(ranks, scale_up_GBps), np.full(ranks, scale_out_GBps)
    total = np.full(nodes, scale_out_GBps * ranks_per_node)
    return Ports(
        node_of_rank=np.repeat(np.arange(nodes), ranks_per_node),
        scale_up_in_GBps=up,
        scale_up_out_GBps=up,
        scale_out_in_GBps=out,
        scale_out_out_GBps=out,
        node_in_GBps=total,
        node_out_GBps=total,
        scale_up_latency_us=latency_us[0],
        scale_out_latency_us=latency_us[1],
    )
