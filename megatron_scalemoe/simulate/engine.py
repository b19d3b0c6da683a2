"""Replays a trace: what each recorded step would have cost under a plan, fixed or remade on the way.

Suffixes: S steps, L layers, G ranks, M links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_scalemoe.cost.layer import LayerCost, layer_cost, replica_link_us
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.migration import migration_bytes, migration_us, moves, state_bytes
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.ports import ports_of
from megatron_scalemoe.topology.routes import Routes
from megatron_scalemoe.traffic.trace import RoutingTrace

# (trace, the steps whose counts it may see, the plan in force) -> the next plan
Planner = Callable[[RoutingTrace, slice, PlacementPlan], PlacementPlan]
_PER_LAYER = ("dispatch_us", "combine_us", "compute_us", "replica_us", "total_us", "bytes_scale_out", "bytes_scale_up", "max_over_mean")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Replay:
    """Every recorded step is one micro-batch, forward and backward. Arrays are float64.

    dispatch_us, combine_us, compute_us, replica_us, total_us, bytes_scale_out, bytes_scale_up, max_over_mean: [S, L], see `LayerCost`.
    load: [S, L, G], selections that each rank computes. wait_us: [S, L, G], how long each rank waits for the most loaded one.
    link_time_us: [M], how long each link is busy in a step, mean over the steps after warm-up.
    migrated_bytes, migration_us: [S], parameters and optimizer state of the homes that moved just before each step, and their time
        (not part of the step's).
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
    link_time_us: np.ndarray
    migrated_bytes: np.ndarray
    migration_us: np.ndarray
    replans: int
    warm_up_steps: int

    def summary(self) -> dict[str, float | int]:
        """Means over the steps after warm-up of each step's sum over the layers; `max_over_mean` over both steps and layers.

        `wait_share`: the mean rank's waiting, as a share of the step. `migrated_bytes`, `migration_us`: of all replans together.
        """
        counted = slice(self.warm_up_steps, None)
        result: dict[str, float | int] = {"step_us": float(self.total_us[counted].sum(axis=1).mean())}
        for name in ("dispatch_us", "combine_us", "compute_us", "replica_us"):
            result[name] = float(getattr(self, name)[counted].sum(axis=1).mean())
        wait_us = self.wait_us[counted].mean(axis=2).sum()
        return result | {
            "max_over_mean_mean": float(self.max_over_mean[counted].mean()),
            "max_over_mean_p95": float(np.quantile(self.max_over_mean[counted], 0.95)),
            "bytes_scale_out": float(self.bytes_scale_out[counted].sum(axis=1).mean()),
            "bytes_scale_up": float(self.bytes_scale_up[counted].sum(axis=1).mean()),
            "wait_share": float(wait_us / max(self.total_us[counted].sum(), np.finfo(float).tiny)),
            "migrated_bytes": float(self.migrated_bytes.sum()),
            "migration_us": float(self.migration_us.sum()),
            "replans": self.replans,
            "steps": self.total_us.shape[0] - self.warm_up_steps,
            "warm_up_steps": self.warm_up_steps,
        }


def replay_fixed(
    trace: RoutingTrace,
    plan: PlacementPlan,
    routes: Routes,
    topology: Topology,
    cost: CostModel,
    *,
    even: bool = False,
    warm_up_steps: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Replays all steps of the trace under one plan. See `replay_plans`."""
    plans = [plan] * trace.num_steps
    return replay_plans(trace, plans, routes, topology, cost, even=even, warm_up_steps=warm_up_steps, progress=progress)


def replanned(
    trace: RoutingTrace, start: PlacementPlan, planner: Planner, *, every: int, lag: int, history: int
) -> Iterator[PlacementPlan]:
    """The plan in force at each step of the trace, for `replay_plans`: remade `every` steps, from counts that are `lag` steps old.

    The first plan is in force at step `lag` (so that many steps are warm-up, under `start`), the next `every` steps later... Each is made
    from the last `history` steps that are known by then. `lag` 0 plans with the step's own counts: what no one can do, a yardstick.

    Raises `ScaleMoEError` when the trace is too short, or a number out of range.
    """
    for name, value, least in (("every", every, 1), ("lag", lag, 0), ("history", history, 1)):
        if value < least:
            raise ScaleMoEError(f"replanning: {name} must be {least} or more recorded steps", found=value)
    if lag >= trace.num_steps:
        raise ScaleMoEError("replanning: the lag must be shorter than the trace", found=f"lag {lag}, {trace.num_steps} recorded steps")
    return _replanned(trace, start, planner, every, lag, history)


def _replanned(trace: RoutingTrace, start: PlacementPlan, planner: Planner, every: int, lag: int, history: int) -> Iterator[PlacementPlan]:
    plan = start
    for step in range(trace.num_steps):
        if step >= lag and (step - lag) % every == 0:
            known = step - lag + 1
            plan = planner(trace, slice(max(0, known - history), known), plan)
        yield plan


def replay_plans(
    trace: RoutingTrace,
    plans: Iterable[PlacementPlan],
    routes: Routes,
    topology: Topology,
    cost: CostModel,
    *,
    even: bool = False,
    warm_up_steps: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Replays the trace, each step under its own plan, with that step's exact counts.

    plans: one per step. even: split tokens evenly over the copies of their expert, instead of balancing the ranks.
    progress: called with the number of finished steps.
    Raises `ScaleMoEError` when trace, plan and topology do not have the same ranks, experts and layers.
    """
    steps: list[list[LayerCost]] = []
    migrations, replans = np.zeros((2, trace.num_steps)), 0
    previous, prices_us = None, []
    for step, plan in zip(range(trace.num_steps), plans, strict=True):
        if plan is not previous:
            check_fits(trace, plan, topology)
            prices_us = [replica_link_us(plan.home_rank[i], plan.hosts(i), cost, routes) for i in range(plan.num_layers)]
            if previous is not None:
                replans += plan.content_hash != previous.content_hash
                migrations[:, step] = _migration(previous, plan, routes, topology, cost)
            previous = plan
        steps.append(_replay_step(trace, step, plan, prices_us, routes, topology, cost, even))
        if progress is not None:
            progress(step + 1)
    return _collect(steps, migrations, cost, replans, warm_up_steps)


def check_fits(trace: RoutingTrace, plan: PlacementPlan, topology: Topology) -> None:
    """Raises `ScaleMoEError` unless the three have the same ranks, and plan and trace the same experts and layers."""
    if trace.num_ranks != topology.num_ranks:
        raise ScaleMoEError("trace and topology must have the same ranks", found=f"{trace.num_ranks} and {topology.num_ranks}")
    made_for = (plan.num_layers, plan.num_ranks, plan.num_logical_experts)
    wanted = (trace.num_layers, trace.num_ranks, trace.num_experts)
    if made_for != wanted:
        problem = "the plan must be for the {} layers, {} ranks and {} experts of the trace".format(*wanted)
        raise ScaleMoEError(problem, found="{} layers, {} ranks, {} experts".format(*made_for), try_="scalemoe plan with this trace")


def _replay_step(
    trace: RoutingTrace,
    step: int,
    plan: PlacementPlan,
    prices_us: list[float],
    routes: Routes,
    topology: Topology,
    cost: CostModel,
    even: bool,
) -> list[LayerCost]:
    layers = []
    for layer, (slots_P, price_us) in enumerate(zip(plan.physical_to_logical, prices_us, strict=True)):
        counts_GE = trace.counts[step, layer].astype(np.int64)
        tokens_GP = split_tokens(counts_GE, slots_P, plan.num_ranks, topology.node_of_rank, even=even)
        traffic = trace.layer(layer, slice(step, step + 1))
        layers.append(layer_cost(tokens_GP, slots_P, traffic, routes, topology, cost, replica_price_us=price_us))
    return layers


def _migration(old: PlacementPlan, new: PlacementPlan, routes: Routes, topology: Topology, cost: CostModel) -> tuple[float, float]:
    """(bytes, us) of moving the homes from one plan to the next."""
    moved = moves(old, new)
    return migration_bytes(moved, cost), migration_us(moved, ports_of(topology, routes), state_bytes(cost))


def _collect(steps: list[list[LayerCost]], migrations: np.ndarray, cost: CostModel, replans: int, warm_up_steps: int) -> Replay:
    columns = {name: np.array([[getattr(layer, name) for layer in step] for step in steps]) for name in _PER_LAYER}
    load = np.array([[layer.load_G for layer in step] for step in steps])
    counted = steps[warm_up_steps:]
    return Replay(
        **columns,
        load=load,
        wait_us=(load.max(axis=2, keepdims=True) - load) * cost.compute_us_per_row,
        link_time_us=np.sum([layer.link_time_us_M for step in counted for layer in step], axis=0) / len(counted),
        migrated_bytes=migrations[0],
        migration_us=migrations[1],
        replans=replans,
        warm_up_steps=warm_up_steps,
    )
