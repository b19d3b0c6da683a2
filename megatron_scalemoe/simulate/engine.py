"""Replays a trace: what each recorded step would have cost under a plan, fixed or remade on the way.

Suffixes: S steps, L layers, G ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from pydantic import Field

from megatron_scalemoe.cost.layer import LayerCost, tokens_cost
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.migration import migration_bytes, migration_us, moves, state_bytes
from megatron_scalemoe.plan.fit import check_fit
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.traffic.trace import RoutingTrace
from megatron_scalemoe.typed import Options

# (trace, the steps whose counts it may see, the plan in force) -> the next plan
Planner = Callable[[RoutingTrace, slice, PlacementPlan], PlacementPlan]
_PER_LAYER = ("dispatch_us", "combine_us", "compute_us", "replica_us", "total_us", "bytes_scale_out", "bytes_scale_up", "max_over_mean")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """Every recorded step is one micro-batch, forward and backward. Arrays are float64.

    dispatch_us, combine_us, compute_us, replica_us, total_us, bytes_scale_out, bytes_scale_up, max_over_mean: [S, L], see `LayerCost`.
    load: [S, L, G], selections that each rank computes. wait_us: [S, L, G], how long each rank waits for the most loaded one.
    migrated_bytes, migration_us: [S], parameters and optimizer state of the homes that moved just before each step, and their time
        (not part of the step's).
    worst_step: the layers of the longest step after warm-up.
    replans: how often the plan changed. warm_up_steps: the first steps, before there was a plan; not part of `summary`.
    """

    dispatch_us: np.ndarray
    combine_us: np.ndarray
    compute_us: np.ndarray
    replica_us: np.ndarray
    total_us: np.ndarray
    bytes_scale_out: np.ndarray
    bytes_scale_up: np.ndarray
    max_over_mean: np.ndarray
    load: np.ndarray
    wait_us: np.ndarray
    migrated_bytes: np.ndarray
    migration_us: np.ndarray
    replans: int
    warm_up_steps: int
    worst_step: list[LayerCost]

    def summary(self) -> dict[str, float | int]:
        """Means over the steps after warm-up of each step's sum over the layers; `max_over_mean` over both steps and layers. Steps without
        tokens are left out (`idle_steps`), and layers of which `max_over_mean` would say nothing.

        `wait_share`: the mean rank's waiting, as a share of the step. `migrated_bytes`, `migration_us`: of all replans together.
        """
        after = np.arange(len(self.total_us)) >= self.warm_up_steps
        counted = after & self.load.any(axis=(1, 2))
        idle_steps = int((after & ~counted).sum())
        counted = counted if counted.any() else after
        balance = self.max_over_mean[counted][self.load[counted].any(axis=2)]
        balance = balance if balance.size else np.ones(1)
        result: dict[str, float | int] = {"step_us": float(self.total_us[counted].sum(axis=1).mean())}
        for name in ("dispatch_us", "combine_us", "compute_us", "replica_us"):
            result[name] = float(getattr(self, name)[counted].sum(axis=1).mean())
        wait_us = self.wait_us[counted].mean(axis=2).sum()
        return result | {
            "max_over_mean_mean": float(balance.mean()),
            "max_over_mean_p95": float(np.quantile(balance, 0.95)),
            "bytes_scale_out": float(self.bytes_scale_out[counted].sum(axis=1).mean()),
            "bytes_scale_up": float(self.bytes_scale_up[counted].sum(axis=1).mean()),
            "wait_share": float(wait_us / max(self.total_us[counted].sum(), np.finfo(float).tiny)),
            "migrated_bytes": float(self.migrated_bytes.sum()),
            "migration_us": float(self.migration_us.sum()),
            "replans": self.replans,
            "steps": int(counted.sum()),
            "idle_steps": idle_steps,
            "warm_up_steps": self.warm_up_steps,
        }


class Replanning(Options):
    """A new plan `every` so many recorded steps, from the last `history` steps of counts that are `lag` recorded steps old.

    `lag` 0 plans with the step's own counts: what no one can do, a yardstick. Raises `ScaleMoEError` on a number out of range.
    """

    every: int = Field(default=1, ge=1)
    lag: int = Field(default=1, ge=0)
    history: int = Field(default=4, ge=1)

    def check(self, trace: RoutingTrace) -> None:
        """Raises `ScaleMoEError` when the trace ends before the first plan."""
        if self.lag >= trace.num_steps:
            found = f"lag {self.lag}, {trace.num_steps} recorded steps"
            raise ScaleMoEError("replanning: the lag must be shorter than the trace", found=found)


def replanned(trace: RoutingTrace, start: PlacementPlan, planner: Planner, replanning: Replanning) -> Iterator[PlacementPlan]:
    """The plan in force at each step of the trace, for `replay`.

    The first plan is in force at step `lag` (so that many steps are warm-up, under `start`), the next `every` steps later... Each is made
    from the last `history` steps that are known by then. Raises `ScaleMoEError` when the trace is too short.
    """
    replanning.check(trace)
    return _replanned(trace, start, planner, replanning)


def _replanned(trace: RoutingTrace, start: PlacementPlan, planner: Planner, replanning: Replanning) -> Iterator[PlacementPlan]:
    plan = start
    for step in range(trace.num_steps):
        since_first = step - replanning.lag
        if since_first >= 0 and since_first % replanning.every == 0:
            known = since_first + 1
            plan = planner(trace, slice(max(0, known - replanning.history), known), plan)
        yield plan


def replay(
    trace: RoutingTrace,
    plans: PlacementPlan | Iterable[PlacementPlan],
    links: Links,
    cost: CostModel,
    *,
    even: bool = False,
    warm_up_steps: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Replays the trace, each step under its own plan, with that step's exact counts.

    plans: one for all steps, or one per step. even: split tokens evenly over the copies of their expert, instead of balancing the ranks.
    progress: called with the number of finished steps.
    Raises `ScaleMoEError` when trace, plan and topology do not have the same ranks, experts and layers.
    """
    check_fit({"the trace": trace, "the topology": links.topology})
    if isinstance(plans, PlacementPlan):
        plans = [plans] * trace.num_steps
    steps: list[list[LayerCost]] = []
    migrations, replans = np.zeros((2, trace.num_steps)), 0
    previous, prices_us = None, []
    for step, plan in zip(range(trace.num_steps), plans, strict=True):
        if plan is not previous:
            check_fit({"the trace": trace, "the plan": plan}, try_="scalemoe plan with this trace")
            prices_us = [replica_us(plan.home_rank[i], plan.hosts(i), cost, links) for i in range(plan.num_layers)]
            if previous is not None:
                replans += plan.content_hash != previous.content_hash
                migrations[:, step] = _migration(previous, plan, links, cost)
            previous = plan
        layers = []
        for layer, (slots_P, price_us) in enumerate(zip(plan.physical_to_logical, prices_us, strict=True)):
            counts_GE = trace.counts[step, layer].astype(np.int64)
            tokens_GP = split_tokens(counts_GE, slots_P, plan.num_ranks, links.node_of_rank, even=even)
            traffic = trace.layer(layer, slice(step, step + 1))
            layers.append(tokens_cost(tokens_GP, slots_P, traffic, links, cost, replica_price_us=price_us))
        steps.append(layers)
        if progress is not None:
            progress(step + 1)
    return _collect(steps, migrations, cost, replans, warm_up_steps)


def _migration(old: PlacementPlan, new: PlacementPlan, links: Links, cost: CostModel) -> tuple[float, float]:
    """(bytes, us) of moving the homes from one plan to the next."""
    moved = moves(old, new)
    return migration_bytes(moved, cost), migration_us(moved, links.ports, state_bytes(cost))


def _collect(steps: list[list[LayerCost]], migrations: np.ndarray, cost: CostModel, replans: int, warm_up_steps: int) -> Replay:
    columns = {name: np.array([[getattr(layer, name) for layer in step] for step in steps]) for name in _PER_LAYER}
    load = np.array([[layer.load_G for layer in step] for step in steps])
    return Replay(
        **columns,
        load=load,
        wait_us=(load.max(axis=2, keepdims=True) - load) * cost.compute_us_per_row,
        migrated_bytes=migrations[0],
        migration_us=migrations[1],
        replans=replans,
        warm_up_steps=warm_up_steps,
        worst_step=max(steps[warm_up_steps:], key=lambda layers: sum(layer.total_us for layer in layers)),
    )
