"""`LayerProblem`: what a solver gets, for one layer; `Solution`: what it returns."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.fit import Sizes, check_fit
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.traffic.trace import LayerTraffic


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerProblem:
    """Place E experts, and up to `replicas` copies of them, on the G ranks of one layer.

    links: where known, they have the final word between placements that the search found at the ports.
    Every rank gets E/G homes and at most `replica_slots_per_rank` replicas. Raises `ScaleMoEError` when that cannot be.
    """

    traffic: LayerTraffic
    ports: Ports
    cost: CostModel
    replicas: int = 0
    links: Links | None = None

    def __post_init__(self) -> None:
        ranks, experts = self.traffic.counts.shape
        check_fit({"the topology": self.ports, "the trace": Sizes(num_ranks=ranks)})
        if experts % ranks:
            raise ScaleMoEError("the number of experts must be a multiple of the ranks", found=f"{experts} experts on {ranks} ranks")
        if not 0 <= self.replicas <= experts * (ranks - 1):
            raise ScaleMoEError(f"replicas must be from 0 to experts x (ranks - 1) = {experts * (ranks - 1)}", found=self.replicas)

    @property
    def num_ranks(self) -> int:
        return self.traffic.counts.shape[0]

    @property
    def num_experts(self) -> int:
        return self.traffic.counts.shape[1]

    @property
    def homes_per_rank(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def replica_slots_per_rank(self) -> int:
        return -(-self.replicas // self.num_ranks)

    @property
    def load(self) -> np.ndarray:
        """float64 [E]: tokens per step that choose each expert."""
        return self.traffic.counts.sum(axis=0)


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """One layer's placement. home_rank: int64 [E]; hosts: bool [E, G], every rank that holds the expert, its home included."""

    home_rank: np.ndarray
    hosts: np.ndarray

    @classmethod
    def without_replicas(cls, home_rank: np.ndarray, num_ranks: int) -> Solution:
        return cls(home_rank, home_rank[:, None] == np.arange(num_ranks))
