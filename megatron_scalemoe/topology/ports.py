"""`Ports`: the capacities through which traffic enters and leaves ranks and nodes.

A placement changes how many bytes cross each port, and only that; so solvers work on ports, which are few, and the links are for the
final word. Ports never overestimate: traffic needs at least the time of its busiest port, whatever the routes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import Routes, backwards
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# Sums of fractions such as 1/3: a link carries all traffic when it carries all but this share.
_ROUNDING = 1e-9


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


def ports_of(topology: Topology, routes: Routes) -> Ports:
    """The ports of a topology: capacities such that any traffic takes at least as long on the links as through the ports.

    A set of links that all traffic of a port must cross (a cut) bounds its rate by the sum of their bandwidths. Two kinds of cut are
    tried and the smallest taken: single links that carry all of it, and all links used at the rank, or at the node's boundary. (For a
    node also the sum over its ranks.)
    """
    nodes = topology.node_of_rank
    same_node_GG = nodes[:, None] == nodes
    up_in, out_in, node_in = _capacities(topology, routes)
    up_out, out_out, node_out = _capacities(topology, backwards(routes))
    apart_GG = ~np.eye(nodes.size, dtype=bool)
    return Ports(
        node_of_rank=nodes,
        scale_up_in_GBps=up_in,
        scale_up_out_GBps=up_out,
        scale_out_in_GBps=out_in,
        scale_out_out_GBps=out_out,
        node_in_GBps=node_in,
        node_out_GBps=node_out,
        scale_up_latency_us=float(routes.latency_us[same_node_GG & apart_GG].max(initial=0)),
        scale_out_latency_us=float(routes.latency_us[~same_node_GG].max(initial=0)),
    )


def port_time_us(bytes_GG: np.ndarray, ports: Ports) -> float:
    """Time of the busiest port for `bytes_GG` [G, G] (row sends to column; the diagonal is free), without latency."""
    nodes, num_nodes = ports.node_of_rank, ports.num_nodes
    same_node_GG = nodes[:, None] == nodes
    up = np.where(same_node_GG, bytes_GG, 0)
    np.fill_diagonal(up, 0)
    out = np.where(same_node_GG, 0, bytes_GG)
    times = [
        up.sum(axis=0) / ports.scale_up_in_GBps,
        up.sum(axis=1) / ports.scale_up_out_GBps,
        out.sum(axis=0) / ports.scale_out_in_GBps,
        out.sum(axis=1) / ports.scale_out_out_GBps,
        np.bincount(nodes, out.sum(axis=0), num_nodes) / ports.node_in_GBps,
        np.bincount(nodes, out.sum(axis=1), num_nodes) / ports.node_out_GBps,
    ]
    return float(max(time.max() for time in times)) / BYTES_PER_US_PER_GBps


def _capacities(topology: Topology, routes: Routes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Into each rank from its node [G], into each rank from other nodes [G], into each node from other nodes [N]."""
    nodes, all_nodes = topology.node_of_rank, np.arange(topology.num_nodes)
    same_node_GG = nodes[:, None] == nodes
    at_rank_MG = routes.targets[:, None] == routes.receives_at
    node_V = np.full(len(routes.split), -1)  # of each position; -1: the fabric, or a node without ranks
    node_V[: len(topology.vertices)] = [v.node if v.node in range(topology.num_nodes) else -1 for v in topology.vertices]
    node_V[routes.sends_at], node_V[routes.receives_at] = nodes, nodes
    enters_MN = (node_V[routes.targets][:, None] == all_nodes) & (node_V[routes.sources][:, None] != all_nodes)

    up_GG = same_node_GG & ~np.eye(nodes.size, dtype=bool)
    up_G = _smallest_cut(routes, routes.link_flow(up_GG.astype(np.float64)), up_GG.sum(axis=0), at_rank_MG)
    flow_MG = routes.link_flow((~same_node_GG).astype(np.float64))
    out_G = _smallest_cut(routes, flow_MG, (~same_node_GG).sum(axis=0), at_rank_MG)
    to_node_GN = (nodes[:, None] == all_nodes).astype(np.float64)
    node_N = _smallest_cut(routes, flow_MG @ to_node_GN, (~same_node_GG).sum(axis=0) @ to_node_GN, enters_MN)
    return up_G, out_G, np.minimum(node_N, np.bincount(nodes, out_G))


def _smallest_cut(routes: Routes, flow_MX: np.ndarray, sent_X: np.ndarray, boundary_MX: np.ndarray) -> np.ndarray:
    """float64 [X]: GB/s into each of X places, which receive `sent_X` over links that then carry `flow_MX`; `inf` where nothing is sent."""
    bandwidth_M1 = routes.link_bandwidth_GBps[:, None]
    used_MX = flow_MX > 0
    carries_all_MX = used_MX & (flow_MX >= sent_X * (1 - _ROUNDING))
    one_link_X = np.where(carries_all_MX, bandwidth_M1, np.inf).min(axis=0, initial=np.inf)
    boundary_X = np.where(boundary_MX & used_MX, bandwidth_M1, 0).sum(axis=0)
    return np.where(sent_X > 0, np.minimum(one_link_X, boundary_X), np.inf)
