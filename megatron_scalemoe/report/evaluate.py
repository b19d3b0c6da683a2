"""What the page computes itself: the load of ranks and links under each plan, for the trace's mean traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links, Unlimited
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.traffic.trace import RoutingTrace

CONTIGUOUS = "contiguous"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Evaluation:
    """One plan under the mean traffic of a trace, per micro-batch, forward and backward.

    load: float64 [L, G], selections that each rank computes. Without a topology the others are None:
    link_us: float64 [M], how long each link is busy, over all layers. total_us: of all layers. bytes_scale_out: between nodes.
    """

    name: str
    plan: PlacementPlan
    load: np.ndarray
    link_us: np.ndarray | None = None
    total_us: float | None = None
    bytes_scale_out: float | None = None

    @property
    def max_over_mean(self) -> np.ndarray:
        """float64 [L], 1 or more; 1 for a layer without tokens."""
        return np.where(self.load.any(axis=1), self.load.max(axis=1) / np.maximum(self.load.mean(axis=1), 1e-300), 1.0)


def evaluate_plans(
    trace: RoutingTrace, topology: Topology | None, plans: dict[str, PlacementPlan], cost: CostModel, *, progress: Callable[[str], None]
) -> list[Evaluation]:
    """The contiguous placement first, then `plans`, which must fit the trace. progress: called with the name of the next one.

    topology: of as many ranks as the trace. Raises `ScaleMoEError` for an exchange that it does not allow (2dh with unequal nodes).
    """
    everything = {CONTIGUOUS: PlacementPlan.contiguous(trace.num_layers, trace.num_ranks, trace.num_experts), **plans}
    network = Unlimited(trace.num_ranks) if topology is None else Links(topology)
    result = []
    for name, plan in everything.items():
        progress(name)
        priced = plan_cost(plan, trace, network, cost)
        load = np.array([layer.load_G for layer in priced.layers])
        if topology is None:
            result.append(Evaluation(name=name, plan=plan, load=load))
            continue
        result.append(
            Evaluation(
                name=name,
                plan=plan,
                load=load,
                link_us=np.sum([layer.busy_us_X for layer in priced.layers], axis=0),
                total_us=priced.total_us,
                bytes_scale_out=priced.bytes_scale_out,
            )
        )
    return result
