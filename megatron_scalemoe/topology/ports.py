"""`Ports`: the capacities through which traffic enters and leaves ranks and nodes.

A placement changes how many bytes cross each port, and only that; so solvers work on ports, which are few, and the links are for the
final word. Ports never overestimate: traffic needs at least the time of its busiest port, whatever the routes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import Routes, backwards
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# Sums of fractions such as 1/3: a link carries all traffic when it carries all but this share.
_ROUNDING = 1e-9


class PortSide(NamedTuple):
    """The ports of all ranks and nodes in one direction, by kind: float64, GB/s (10^9 bytes/s), `inf` where nothing limits.

    scale_up_GBps: [G], between a rank and the other ranks of its node.
    scale_out_GBps: [G], between a rank and the ranks of other nodes.
    node_GBps: [N], all traffic between a node and the other nodes (shared NICs).
    """

    scale_up_GBps: np.ndarray
    scale_out_GBps: np.ndarray
    node_GBps: np.ndarray

    def busiest(self, passes: Iterable[np.ndarray]) -> float:
        """The largest quotient of what passes a port and its GB/s. passes: an array per kind, in the order of the fields."""
        return float(max((amount / capacity).max() for amount, capacity in zip(passes, self, strict=True)))


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Ports:
    """Port capacities. G ranks, N nodes.

    node_of_rank: int [G].
    into, out: what enters ranks and nodes, and what leaves them.
    scale_up_latency_us, scale_out_latency_us: the largest latency between two ranks of one node, of different nodes (0 if none).
    """

    node_of_rank: np.ndarray
    into: PortSide
    out: PortSide
    scale_up_latency_us: float
    scale_out_latency_us: float

    @property
    def num_ranks(self) -> int:
        return self.node_of_rank.shape[0]

    @property
    def num_nodes(self) -> int:
        return self.into.node_GBps.shape[0]

    @property
    def node_sizes(self) -> np.ndarray:
        """int64 [N]: the ranks of each node."""
        return np.bincount(self.node_of_rank, minlength=self.num_nodes)

    @property
    def in_node_GN(self) -> np.ndarray:
        """float64 [G, N]: 1 at each rank's node. `x_XG @ in_node_GN` sums over the ranks of each node."""
        return (self.node_of_rank[:, None] == np.arange(self.num_nodes)).astype(np.float64)

    @property
    def same_node_GG(self) -> np.ndarray:
        """bool [G, G]: whether two ranks share a node."""
        return self.node_of_rank[:, None] == self.node_of_rank

    @property
    def same_both_ways(self) -> bool:
        """Whether every port is as fast in as out, so that dispatch and combine take the same time."""
        return all(np.array_equal(into, out) for into, out in zip(self.into, self.out, strict=True))

    @property
    def rank_features(self) -> np.ndarray:
        """float64 [G, 5]: node and capacities of each rank; ranks with equal rows are interchangeable."""
        return np.column_stack([self.node_of_rank, *self.into[:2], *self.out[:2]])

    def to_other_nodes_GBps(self, side: PortSide) -> np.ndarray:
        """float64 [G]: of a rank's scale-out port and its node's, the narrower. side: `into` or `out`."""
        return np.minimum(side.scale_out_GBps, side.node_GBps[self.node_of_rank])

    def pair_GBps(self) -> np.ndarray:
        """float64 [G, G]: what each pair of ranks (row to column) would have alone; `inf` on the diagonal."""
        near_GG = np.minimum(self.out.scale_up_GBps[:, None], self.into.scale_up_GBps)
        far_GG = np.minimum(self.to_other_nodes_GBps(self.out)[:, None], self.to_other_nodes_GBps(self.into))
        pair_GG = np.where(self.same_node_GG, near_GG, far_GG)
        np.fill_diagonal(pair_GG, np.inf)
        return pair_GG

    def subset(self, ranks: Sequence[int]) -> Ports:
        """The ports of these ranks, in this order, and of their nodes, counted from 0 again."""
        nodes, node_of_rank = np.unique(self.node_of_rank[ranks], return_inverse=True)
        into, out = (PortSide(up_G[ranks], out_G[ranks], node_N[nodes]) for up_G, out_G, node_N in (self.into, self.out))
        return dataclasses.replace(self, node_of_rank=node_of_rank.reshape(-1), into=into, out=out)

    def busy_us(self, bytes_GG: np.ndarray) -> np.ndarray:
        """float64 [X]: how long each port is busy with `bytes_GG` [G, G] (row sends to column; the diagonal is free), without latency.

        X is all ports in: ranks from their node, ranks from other nodes, nodes; then all ports out.
        """
        near_GG = np.where(self.same_node_GG, bytes_GG, 0)
        np.fill_diagonal(near_GG, 0)
        far_GG = np.where(self.same_node_GG, 0, bytes_GG)
        busy = []
        for side, axis in ((self.into, 0), (self.out, 1)):
            far_G = far_GG.sum(axis=axis)
            passes = (near_GG.sum(axis=axis), far_G, np.bincount(self.node_of_rank, far_G, self.num_nodes))
            busy += [amount / capacity for amount, capacity in zip(passes, side, strict=True)]
        return np.concatenate(busy) / BYTES_PER_US_PER_GBps

    def latency_us(self, bytes_GG: np.ndarray) -> float:
        """The largest latency among the pairs of ranks that send each other something; 0 where none does."""
        if ((bytes_GG > 0) & ~self.same_node_GG).any():
            return self.scale_out_latency_us
        talk_GG = bytes_GG > 0
        np.fill_diagonal(talk_GG, False)
        return self.scale_up_latency_us if talk_GG.any() else 0.0


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
    side = PortSide(np.full(ranks, scale_up_GBps), np.full(ranks, scale_out_GBps), np.full(nodes, scale_out_GBps * ranks_per_node))
    return Ports(
        node_of_rank=np.repeat(np.arange(nodes), ranks_per_node),
        into=side,
        out=side,
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
    apart_GG = ~np.eye(nodes.size, dtype=bool)
    return Ports(
        node_of_rank=nodes,
        into=_capacities(topology, routes),
        out=_capacities(topology, backwards(routes)),
        scale_up_latency_us=float(routes.latency_us[same_node_GG & apart_GG].max(initial=0)),
        scale_out_latency_us=float(routes.latency_us[~same_node_GG].max(initial=0)),
    )


def _capacities(topology: Topology, routes: Routes) -> PortSide:
    """Into the ranks and nodes."""
    nodes, all_nodes = topology.node_of_rank, np.arange(topology.num_nodes)
    same_node_GG = nodes[:, None] == nodes
    at_rank_MG = routes.targets[:, None] == routes.receives_at
    enters_MN = (routes.node_V[routes.targets][:, None] == all_nodes) & (routes.node_V[routes.sources][:, None] != all_nodes)

    up_GG = same_node_GG & ~np.eye(nodes.size, dtype=bool)
    up_G = _smallest_cut(routes, routes.link_flow(up_GG.astype(np.float64)), up_GG.sum(axis=0), at_rank_MG)
    flow_MG = routes.link_flow((~same_node_GG).astype(np.float64))
    out_G = _smallest_cut(routes, flow_MG, (~same_node_GG).sum(axis=0), at_rank_MG)
    to_node_GN = (nodes[:, None] == all_nodes).astype(np.float64)
    node_N = _smallest_cut(routes, flow_MG @ to_node_GN, (~same_node_GG).sum(axis=0) @ to_node_GN, enters_MN)
    return PortSide(up_G, out_G, np.minimum(node_N, np.bincount(nodes, out_G)))


def _smallest_cut(routes: Routes, flow_MX: np.ndarray, sent_X: np.ndarray, boundary_MX: np.ndarray) -> np.ndarray:
    """float64 [X]: GB/s into each of X places, which receive `sent_X` over links that then carry `flow_MX`; `inf` where nothing is sent."""
    bandwidth_M1 = routes.link_bandwidth_GBps[:, None]
    used_MX = flow_MX > 0
    carries_all_MX = used_MX & (flow_MX >= sent_X * (1 - _ROUNDING))
    one_link_X = np.where(carries_all_MX, bandwidth_M1, np.inf).min(axis=0, initial=np.inf)
    boundary_X = np.where(boundary_MX & used_MX, bandwidth_M1, 0).sum(axis=0)
    return np.where(sent_X > 0, np.minimum(one_link_X, boundary_X), np.inf)
