"""Which of the candidates a replan takes."""

import dataclasses

import numpy as np
import pytest

from megatron_scalemoe.placement.replan.policy import ReplanPolicy
from megatron_scalemoe.placement.replan.replan import _Candidate, _cheapest_within, replan
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from tests.placement.replan.test_replan import COST, OPTIONS, PORTS, start, zipf_trace


def test_replicas_stay_where_others_save_less_than_asked_for():
    trace = zipf_trace(0)
    assert replan(trace, start(), PORTS, COST, OPTIONS).changed
    assert not replan(trace, start(), PORTS, COST, dataclasses.replace(OPTIONS, policy=ReplanPolicy(min_saving=0.99))).changed


def test_a_step_costs_all_its_micro_batches():
    options = dataclasses.replace(OPTIONS, replicas=0)
    one, eight = (replan(zipf_trace(0), start(0), PORTS, COST.replaced(micro_batches=n), options).current_us for n in (1, 8))
    assert eight == pytest.approx(8 * one)


def test_a_layer_changes_where_that_is_cheapest_with_its_migration():
    stay, move = PlacementPlan.contiguous(2, 2, 2), PlacementPlan(np.array([[1, 0], [1, 0]]), 2, 2)
    candidates = [_Candidate(stay, np.full(2, 10.0), np.zeros(2)), _Candidate(move, np.array([5.0, 9.9]), np.full(2, 100.0))]
    chosen = _cheapest_within(candidates, horizon_steps=100)
    assert chosen.plan.physical_to_logical.tolist() == [[1, 0], [0, 1]]
