"""When to replan: never without gain, never back and forth, only what pays back in time."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.replan.policy import ReplanPolicy, should_replan

COST = st.floats(0, 1e9)


@given(current=COST, proposed=COST, migration=COST, noise=COST, unpaid=st.floats(-1e9, 1e9))
def test_a_move_always_gains_and_pays_back(current, proposed, migration, noise, unpaid):
    policy = ReplanPolicy()
    decision = should_replan(current, proposed, migration, policy, noise_us=noise, unpaid_us=unpaid)
    assert decision.reason
    if decision.replan:
        assert proposed < current
        assert current - proposed >= policy.min_saving * current
        assert (current - proposed) * policy.horizon_steps >= migration
    if proposed >= current:
        assert not decision.replan


@given(current=COST, proposed=COST, migration=COST, more=COST)
def test_a_dearer_or_less_certain_move_is_never_preferred(current, proposed, migration, more):
    if not should_replan(current, proposed, migration).replan:
        assert not should_replan(current, proposed, migration + more).replan
        assert not should_replan(current, proposed, migration, noise_us=more).replan
        assert not should_replan(current, proposed, migration, unpaid_us=more).replan


@given(a=COST, b=COST)
def test_no_two_plans_are_each_worth_leaving_for_the_other(a, b):
    assert not (should_replan(a, b, 0.0).replan and should_replan(b, a, 0.0).replan)


@given(seed=st.integers(0, 1000), min_saving=st.floats(0.01, 0.2))
def test_nearly_equal_plans_never_flip_flop_however_the_measurements_vary(seed, min_saving):
    rng, policy = np.random.default_rng(seed), ReplanPolicy(min_saving=min_saving)
    in_force, moves = 0, 0
    for _ in range(200):
        costs = 1000.0 * (1 + rng.uniform(-0.49, 0.49, 2) * min_saving)
        if should_replan(costs[in_force], costs[1 - in_force], 0.0, policy).replan:
            in_force, moves = 1 - in_force, moves + 1
    assert moves == 0


def test_an_unpaid_migration_delays_the_next_one():
    assert should_replan(1000.0, 900.0, 40_000.0).replan
    assert not should_replan(1000.0, 900.0, 40_000.0, unpaid_us=30_000.0).replan
    assert should_replan(1000.0, 900.0, 40_000.0, unpaid_us=-30_000.0).payback_steps == 400


@pytest.mark.parametrize(
    ("current", "proposed", "migration", "noise", "replan", "words"),
    [
        (1000.0, 1000.0, 0.0, 0.0, False, "saves nothing"),
        (0.0, 0.0, 0.0, 0.0, False, "saves nothing"),
        (1000.0, 950.0, 0.0, 30.0, False, "within the noise"),
        (1000.0, 990.0, 0.0, 0.0, False, "saves 0.01 ms a step (1.0%), less than 2.0%"),
        (1000.0, 900.0, 1e6, 0.0, False, "pays back 1e+03 ms in 10000 steps: more than 500"),
        (1000.0, 900.0, 35_000.0, 0.0, True, "saves 0.1 ms a step (10.0%), pays back 35 ms in 350 steps"),
    ],
)
def test_the_reason_is_said_in_words(current, proposed, migration, noise, replan, words):
    decision = should_replan(current, proposed, migration, noise_us=noise)
    assert decision.replan == replan
    assert words in decision.reason


@pytest.mark.parametrize(("name", "value"), [("min_saving", -0.1), ("horizon_steps", 0), ("noise_factor", math.nan)])
def test_policies_out_of_range_are_refused(name, value):
    with pytest.raises(ScaleMoEError, match=name):
        dataclasses.replace(ReplanPolicy(), **{name: value})


@pytest.mark.parametrize(("position", "name"), [(0, "current_us"), (1, "proposed_us"), (2, "migration_us")])
def test_costs_that_are_no_numbers_are_refused(position, name):
    costs = [1000.0, 900.0, 10.0]
    costs[position] = math.nan
    with pytest.raises(ScaleMoEError, match=name):
        should_replan(*costs)
