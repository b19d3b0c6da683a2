"""The plans that solvers make for a trace, and how they are judged."""

import dataclasses

import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.plan_trace import PlanRequest, plan_trace
from megatron_scalemoe.placement.solve import solve_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.simulate.engine import Replanning, replay
from megatron_scalemoe.simulate.policies import Comparison, planned_steps
from megatron_scalemoe.traffic.trace import RoutingTrace
from tests.cost.cluster import equal_nodes, star_cluster
from tests.simulate.test_engine import small_trace

COST = CostModel(hidden_size=64, ffn_hidden_size=32, gpu_TFLOPs=0.001)
TOPOLOGY = star_cluster(equal_nodes(2, 2))


def request_of(trace: RoutingTrace, **options) -> PlanRequest:
    return PlanRequest(trace=trace, topology=TOPOLOGY, cost=COST, **{"solver": "greedy", "time_budget_s": 0.3, **options})


def homes(plans) -> list[list]:
    return [plan.home_rank.tolist() for plan in plans]


def test_one_plan_serves_every_step_relabelled_so_that_few_experts_leave_their_contiguous_home():
    """Ranks with equal links may swap their names; `random` places whole sets of experts anywhere."""
    request, contiguous = request_of(small_trace(), solver="random"), PlacementPlan.contiguous(3, 4, 8)
    plans = list(planned_steps(request))
    assert len(plans) == 5 and all(plan is plans[0] for plan in plans)
    raw = solve_trace(request.trace, request.links.ports, COST, solver="random").plan
    moved, moved_raw = (int((plan.home_rank != contiguous.home_rank).sum()) for plan in (plans[0], raw))
    assert moved < moved_raw
    assert homes(planned_steps(request_of(small_trace(), solver="random", seed=1))) != homes(plans)


def test_a_row_is_the_replay_without_warm_up_and_the_cost_of_the_last_plan():
    request, replanning = request_of(small_trace()), Replanning(every=2, lag=1)
    plans = list(planned_steps(request, replanning))
    row = Comparison(request, replanning).row("greedy", plans, seconds=2.0)
    replayed = replay(request.trace, plans, request.links, COST, warm_up_steps=1)
    assert {name: row[name] for name in replayed.summary()} == replayed.summary()
    assert plans[-1].content_hash != plans[1].content_hash
    assert row["cost_us"] == plan_cost(plans[-1], request.trace, request.links, COST).total_us
    assert (row["policy"], row["seconds"]) == ("greedy", 2.0)


def test_replans_come_every_n_steps_from_counts_as_old_as_the_lag():
    """Steps 0 and 1: warm-up under the contiguous plan. Then the expert that was hot `lag` steps earlier decides."""
    plans = list(planned_steps(request_of(small_trace(steps=9)), Replanning(every=3, lag=2)))
    contiguous = PlacementPlan.contiguous(3, 4, 8)
    assert homes(plans[:2]) == homes([contiguous, contiguous])
    assert [step for step in range(1, 9) if plans[step] is not plans[step - 1]] == [2, 5, 8]
    seen = [slice(0, 1), slice(0, 4), slice(7 - Replanning().history, 7)]
    for step, steps in zip((2, 5, 8), seen, strict=True):
        assert plans[step].provenance["steps"] == list(steps.indices(9)), f"the plan of step {step}"


def test_a_replan_ignores_what_was_recorded_after_its_counts():
    trace = small_trace(steps=6)
    future = trace.counts.copy()
    future[3:] = future[3:, :, :, ::-1]
    changed = RoutingTrace(future, meta=trace.meta)
    before, after = (homes(planned_steps(request_of(t), Replanning(every=1, lag=1))) for t in (trace, changed))
    assert before[:4] == after[:4]
    assert before[4:] != after[4:]


def test_an_unknown_solver_and_a_lag_as_long_as_the_trace_are_refused_at_once():
    request = request_of(small_trace())
    with pytest.raises(ScaleMoEError, match="no such solver"):
        planned_steps(request, solver="memtic")
    for refused in (planned_steps, Comparison):
        with pytest.raises(ScaleMoEError, match="lag 5, 5 recorded steps"):
            refused(request, Replanning(lag=5))


def test_a_request_that_cannot_be_is_refused_by_name():
    for options, named in (
        ({"replicas": -1}, "replicas"),
        ({"seed": -1}, "seed"),
        ({"last_steps": 0}, "last_steps"),
        ({"last_steps": 6}, "last_steps: must be at most the 5"),
        ({"time_budget_s": float("nan")}, "time_budget"),
        ({"time_budget_s": 0.0}, "time_budget"),
        ({"solver": "memtic"}, "no such solver"),
    ):
        with pytest.raises(ScaleMoEError, match=named):
            request_of(small_trace(), **options)


def test_the_plan_of_a_request_is_that_of_its_steps_seed_and_replicas_and_says_so():
    request = request_of(small_trace(layers=1), solver="greedy", seed=7, replicas=4, last_steps=2, time_budget_s=30.0)
    report = plan_trace(request)
    assert 0 < report.plan.num_replicas.max() <= 4
    np.testing.assert_array_equal(np.sort(np.unique(report.plan.home_rank[0], return_counts=True)[1]), [2, 2, 2, 2])
    provenance = report.plan.provenance
    assert (provenance["solver"], provenance["seed"], provenance["replicas"], provenance["steps"]) == ("greedy", 7, 4, [3, 5, 1])
    assert (provenance["trace_hash"], provenance["topology_hash"]) == (request.trace.content_hash, TOPOLOGY.content_hash)
    assert provenance["node_of_rank"] == TOPOLOGY.node_of_rank.tolist()
    other_seed = plan_trace(dataclasses.replace(request, solver="random", replicas=0, seed=8)).plan
    assert other_seed.content_hash != plan_trace(dataclasses.replace(request, solver="random", replicas=0)).plan.content_hash
