"""`plan_cost`: what a plan costs under the mean traffic of recorded steps, layer by layer and in all."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.layer import LayerCost, split_cost
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Network
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.trace import RoutingTrace


@dataclasses.dataclass(frozen=True, eq=False)
class PlanCost:
    """The cost of each layer in one micro-batch, forward and backward; the others are sums over the layers, and their balance."""

    layers: tuple[LayerCost, ...]

    @property
    def total_us(self) -> float:
        return sum(layer.total_us for layer in self.layers)

    @property
    def bytes_scale_out(self) -> float:
        return sum(layer.bytes_scale_out for layer in self.layers)

    @property
    def replica_us(self) -> float:
        return sum(layer.replica_us for layer in self.layers)

    @property
    def max_over_mean(self) -> np.ndarray:
        """float64, 1 or more, of the layers that have tokens."""
        return np.array([layer.max_over_mean for layer in self.layers if layer.load_G.any()] or [1.0])


def plan_cost(
    plan: PlacementPlan,
    trace: RoutingTrace,
    network: Network,
    cost: CostModel,
    *,
    steps: slice = slice(None),
    even: bool = False,
) -> PlanCost:
    """Cost of the mean traffic of `steps` under a plan for the ranks, experts and layers of the trace. even: see `split.split_tokens`.

    Raises `ScaleMoEError` for the exchange 2dh with nodes of different sizes.
    """
    layers = []
    for layer, slots_P in enumerate(plan.physical_to_logical):
        placement = (slots_P, plan.home_rank[layer], plan.hosts(layer))
        layers.append(split_cost(*placement, trace.layer(layer, steps), network, cost, even=even))
    return PlanCost(tuple(layers))
