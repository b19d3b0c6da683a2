"""`diff_plans`: what changes from a plan to another, and, with the cluster and a trace, what that costs and gains."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links, Unlimited
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.placement.migration import (
    align_plan,
    interchangeable_ranks,
    migration_us,
    moves,
    replicas_removed,
    rounds,
    state_bytes,
)
from megatron_scalemoe.placement.replan.policy import ReplanPolicy, should_replan
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.trace import RoutingTrace

COUNTS = ("homes_moved", "replicas_added", "replicas_removed", "rounds")


def diff_plans(
    old: PlacementPlan,
    new: PlacementPlan,
    cost: CostModel,
    *,
    links: Links | None = None,
    trace: RoutingTrace | None = None,
    policy: ReplanPolicy | None = None,
) -> dict:
    """`layers`: of each layer, and `total`: of all, what `COUNTS` names, by name. Both plans, and the others, are of the same sizes.

    `total` has `bytes` of the homes that move. links add `migration_us` and `homes_moved_if_aligned`, the homes that would move if
    interchangeable ranks took each other's experts. A trace adds `max_over_mean_old` and `_new`; both together `cost_us_old` and `_new`,
    and whether to `replan` by `policy`, with a `reason`. Raises `ScaleMoEError` for plans of different sizes.
    """
    layers = _moves_of_layers(old, new)
    total = {key: sum(layer[key] for layer in layers) for key in COUNTS}
    total["bytes"] = total["homes_moved"] * state_bytes(cost)
    if links is not None:
        aligned = align_plan(old, new, interchangeable_ranks(links.ports))
        total["migration_us"] = migration_us(moves(old, new), links.ports, state_bytes(cost))
        total["homes_moved_if_aligned"] = moves(old, aligned).num_homes
    if trace is None:
        return {"layers": layers, "total": total}
    for name, plan in (("old", old), ("new", new)):
        priced = plan_cost(plan, trace, links or Unlimited(trace.num_ranks), cost)
        total[f"max_over_mean_{name}"] = float(priced.max_over_mean.mean())
        for layer, layer_cost in zip(layers, priced.layers, strict=True):
            layer[f"max_over_mean_{name}"] = layer_cost.max_over_mean
        if links is not None:
            total[f"cost_us_{name}"] = priced.total_us
            for layer, layer_cost in zip(layers, priced.layers, strict=True):
                layer[f"cost_us_{name}"] = layer_cost.total_us
    if links is not None:
        step_us = [total[f"cost_us_{name}"] * cost.micro_batches for name in ("old", "new")]
        decision = should_replan(*step_us, total["migration_us"], policy)
        total |= {"replan": decision.replan, "reason": decision.reason}
    return {"layers": layers, "total": total}


def _moves_of_layers(old: PlacementPlan, new: PlacementPlan) -> list[dict]:
    moved = moves(old, new)
    counted = (
        moved.layer[moved.is_home],
        moved.layer[~moved.is_home],
        np.repeat(np.arange(new.num_layers), replicas_removed(old, new)),
        [moved.layer[chosen[0]] for chosen in rounds(moved, new.num_ranks)],
    )
    counts_CL = [np.bincount(np.array(layers, dtype=np.int64), minlength=new.num_layers).tolist() for layers in counted]
    return [{"layer": layer, **dict(zip(COUNTS, counts, strict=True))} for layer, counts in enumerate(zip(*counts_CL, strict=True))]
