"""What carries an exchange: the links of a cluster, or the ports through which its ranks and nodes send and receive.

Solvers work with ports, which are few; the links have the final word. Everything else of a layer's cost is the same for both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.ports import Ports, ports_of
from megatron_scalemoe.topology.routes import Routes, compute_routes
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


class Network(Protocol):
    """`Ports` and `Links`: X of them, between G ranks."""

    @property
    def node_of_rank(self) -> np.ndarray:
        """int [G]."""

    def busy_us(self, bytes_GG: np.ndarray) -> np.ndarray:
        """float64 [X]: how long each link, or port, is busy with `bytes_GG` (row sends to column; the diagonal is free)."""

    def latency_us(self, bytes_GG: np.ndarray) -> float:
        """The largest latency between ranks that send to each other."""


@dataclasses.dataclass(frozen=True, eq=False)
class Links:
    """The links of a topology, with the routes over them and the ports that they make; both are computed once, when first needed."""

    topology: Topology

    @functools.cached_property
    def routes(self) -> Routes:
        return compute_routes(self.topology)

    @functools.cached_property
    def ports(self) -> Ports:
        return ports_of(self.topology, self.routes)

    @property
    def node_of_rank(self) -> np.ndarray:
        return self.topology.node_of_rank

    def busy_us(self, bytes_GG: np.ndarray) -> np.ndarray:
        return self.routes.link_load(bytes_GG) / self.routes.link_bandwidth_GBps / BYTES_PER_US_PER_GBps

    def latency_us(self, bytes_GG: np.ndarray) -> float:
        return float(self.routes.latency_us[bytes_GG > 0].max(initial=0.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Unlimited:
    """One node where nothing takes time: for the balance alone, when the cluster is not known."""

    num_ranks: int

    @property
    def node_of_rank(self) -> np.ndarray:
        return np.zeros(self.num_ranks, dtype=np.int64)

    def busy_us(self, bytes_GG: np.ndarray) -> np.ndarray:
        return np.zeros(1)

    def latency_us(self, bytes_GG: np.ndarray) -> float:
        return 0.0
