"""The flags of planning, and the plans that they ask for."""

import argparse

import numpy as np
import pytest

from megatron_scalemoe.cli.planning.requests import (
    HISTORY,
    Planning,
    add_planning_flags,
    add_replanning_flags,
    check_planning_flags,
    planned_steps,
)
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.defaults import TIME_BUDGET_S
from megatron_scalemoe.placement.solve import solve_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.trace import RoutingTrace
from tests.simulate.test_engine import small_trace

PORTS = two_level_ports(2, 2)
COST = CostModel(hidden_size=64, ffn_hidden_size=32, gpu_TFLOPs=0.001)


def flags(*arguments: str, budget: float | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_replanning_flags(add_planning_flags(parser, time_budget_s=budget))
    return parser.parse_args(arguments)


def planning(*arguments: str) -> Planning:
    return Planning.from_args(flags(*arguments))


def homes(plans) -> list[list]:
    return [plan.home_rank.tolist() for plan in plans]


@pytest.mark.parametrize(("flag", "value", "least"), [("replicas", -1, 0), ("replan-every", 0, 1), ("replan-lag", -1, 0), ("seed", -1, 0)])
def test_a_number_below_its_least_is_refused_by_the_name_of_its_flag(flag, value, least):
    with pytest.raises(ScaleMoEError, match=f"--{flag} must be {least} or more\n  found: {value}"):
        check_planning_flags(flags(f"--{flag}", str(value)))
    check_planning_flags(flags(f"--{flag}", str(least)))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_time_budget_is_a_number_of_seconds(value):
    with pytest.raises(ScaleMoEError, match="--time-budget must be a number of seconds above 0"):
        check_planning_flags(flags(f"--time-budget={value}"))


def test_without_flags_there_is_one_plan_of_the_whole_trace_in_ten_seconds():
    default = planning()
    assert (default.replicas, default.seed, default.time_budget_s, default.warm_up_steps) == (0, 0, TIME_BUDGET_S, 0)
    assert (default.replan_every, default.replan_lag) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "every", "lag"),
    [(["--replan-every", "3"], 3, 1), (["--replan-lag", "2"], 1, 2), (["--replan-every", "4", "--replan-lag", "0"], 4, 0)],
)
def test_either_replanning_flag_brings_the_other_and_a_shorter_budget(arguments, every, lag):
    replanning = planning(*arguments)
    assert (replanning.replan_every, replanning.replan_lag, replanning.warm_up_steps, replanning.time_budget_s) == (every, lag, lag, 1.0)
    assert planning(*arguments, "--time-budget", "7").time_budget_s == 7.0


def test_one_plan_serves_every_step_unless_replanning():
    trace = small_trace()
    plans = list(planned_steps("greedy", planning(), trace, PORTS, COST))
    assert len(plans) == trace.num_steps
    assert all(plan is plans[0] for plan in plans)


def test_a_plan_is_relabelled_so_that_few_experts_leave_their_contiguous_home():
    """Ranks with equal links may swap their names; `random` places whole sets of experts anywhere."""
    trace, contiguous = small_trace(), PlacementPlan.contiguous(3, 4, 8)
    [plan, *_] = planned_steps("random", planning(), trace, PORTS, COST)
    raw = solve_trace(trace, PORTS, COST, solver="random").plan

    def moved(one: PlacementPlan) -> int:
        return int((one.home_rank != contiguous.home_rank).sum())

    assert moved(plan) < moved(raw)


def test_replans_come_every_n_steps_from_counts_as_old_as_the_lag():
    """Step 0 and 1: warm-up under the contiguous plan. Then the expert that was hot `lag` steps earlier decides."""
    trace = small_trace(steps=9)
    plans = list(planned_steps("greedy", planning("--replan-every", "3", "--replan-lag", "2"), trace, PORTS, COST))
    contiguous = PlacementPlan.contiguous(3, 4, 8)
    assert homes(plans[:2]) == homes([contiguous, contiguous])
    assert [step for step in range(1, 9) if plans[step] is not plans[step - 1]] == [2, 5, 8]
    seen = [slice(0, 1), slice(0, 4), slice(7 - HISTORY, 7)]
    for step, steps in zip((2, 5, 8), seen, strict=True):
        assert plans[step].provenance["steps"] == list(steps.indices(9)), f"the plan of step {step}"


def test_a_replan_ignores_what_was_recorded_after_its_counts():
    trace = small_trace(steps=6)
    future = trace.counts.copy()
    future[3:] = future[3:, :, :, ::-1]
    changed = RoutingTrace(future, meta=trace.meta)
    options = planning("--replan-every", "1", "--replan-lag", "1")
    before, after = (homes(planned_steps("greedy", options, t, PORTS, COST)) for t in (trace, changed))
    assert before[:4] == after[:4]
    assert before[4:] != after[4:]


def test_replicas_are_within_what_the_flag_allows():
    trace = small_trace()
    [plan, *_] = planned_steps("memetic", planning("--replicas", "4", "--time-budget", "0.5"), trace, PORTS, COST)
    assert plan.slots_per_rank == 3
    assert 0 < plan.num_replicas.max() <= 4
    np.testing.assert_array_equal(np.sort(np.unique(plan.home_rank[0], return_counts=True)[1]), [2, 2, 2, 2])


def test_an_unknown_solver_and_a_lag_as_long_as_the_trace_are_refused_at_once():
    with pytest.raises(ScaleMoEError, match="no such solver"):
        planned_steps("memtic", planning(), small_trace(), PORTS, COST)
    with pytest.raises(ScaleMoEError, match="lag 5, 5 recorded steps"):
        planned_steps("greedy", planning("--replan-lag", "5"), small_trace(), PORTS, COST)
