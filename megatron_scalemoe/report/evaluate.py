"""What the page computes itself: the load of ranks and links under each plan, for the trace's mean traffic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from megatron_scalemoe.cost.layer import plan_cost, whole_counts
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.traffic.matrices import selections_between_ranks
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
    traffic = [trace.layer(layer) for layer in range(trace.num_layers)]
    routes = None if topology is None else compute_routes(topology)
    result = []
    for name, plan in everything.items():
        progress(name)
        if topology is None or routes is None:
            one_node = np.zeros(trace.num_ranks, dtype=np.int64)
            load = [_rank_load(whole_counts(t.counts), slots, one_node) for t, slots in zip(traffic, plan.physical_to_logical, strict=True)]
            result.append(Evaluation(name=name, plan=plan, load=np.array(load, dtype=np.float64)))
            continue
        layers = [plan_cost(plan, layer, traffic[layer], routes, topology, cost) for layer in range(trace.num_layers)]
        result.append(
            Evaluation(
                name=name,
                plan=plan,
                load=np.array([layer.load_G for layer in layers]),
                link_us=np.sum([layer.link_time_us_M for layer in layers], axis=0),
                total_us=sum(layer.total_us for layer in layers),
                bytes_scale_out=sum(layer.bytes_scale_out for layer in layers),
            )
        )
    return result


def _rank_load(counts_GE: np.ndarray, slots_P: np.ndarray, node_of_rank_G: np.ndarray) -> np.ndarray:
    ranks = counts_GE.shape[0]
    return selections_between_ranks(split_tokens(counts_GE, slots_P, ranks, node_of_rank_G), ranks).sum(axis=0)
