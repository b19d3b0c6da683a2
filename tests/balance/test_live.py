"""Live balance is exact: whatever the plan does during training, the loss is stock Megatron's."""

import functools
import json
import os

import pytest

from megatron_scalemoe.plan.placement_plan import load_plan
from tests.rank_pool import pool

# The promise is about 200 steps: SCALEMOE_LIVE_STEPS=200 runs all cases as long. Here they are shorter, for time.
STEPS, SHORT = (int(os.environ.get("SCALEMOE_LIVE_STEPS", default)) for default in ("60", "20"))
CASES = {
    "ep2": (2, {"ep": 2}, 2, STEPS),
    "ep2, accumulation 4": (2, {"ep": 2, "micro_batches": 4}, 8, SHORT),
    "ep2, distributed optimizer, overlap": (2, {"ep": 2, "distributed_optimizer": True, "overlap": True}, 4, SHORT),
    "ep2, recomputation, overlap": (2, {"ep": 2, "recompute": True, "overlap": True}, 6, SHORT),
    "ep2, capacity": (2, {"ep": 2, "capacity_factor": 1.0}, 4, SHORT),
    "ep4": (4, {"ep": 4}, 4, SHORT),
    "ep4, distributed optimizer": (4, {"ep": 4, "distributed_optimizer": True}, 8, SHORT),
    "ep2 x dp2, distributed optimizer, overlap": (4, {"ep": 2, "distributed_optimizer": True, "overlap": True}, 8, SHORT),
    "tp2 x ep2": (4, {"ep": 2, "tp": 2, "expert_tp": 2, "dispatcher": "allgather"}, 4, SHORT),
    "pp2 x ep2": (4, {"ep": 2, "pp": 2}, 2, SHORT),
}


def on_ranks(ranks: int, name: str, *args, timeout_s: float = 240, **kwargs) -> list:
    return pool(ranks).run(_call, name, args, kwargs, timeout_s=timeout_s)


def _call(name: str, args: tuple, kwargs: dict):
    from tests.balance import live_case

    return getattr(live_case, name)(live_case.Setup(**args[0]), *args[1:], **kwargs)


@functools.cache
def stock(ranks: int, options: str, steps: int) -> list[float]:
    return on_ranks(ranks, "stock_losses", json.loads(options), steps)[0]


def difference(losses: list[float], ranks: int, options: dict) -> float:
    expected = stock(ranks, json.dumps(options), len(losses))
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_random_replans_and_migrations(name):
    ranks, options, replicas, steps = CASES[name]
    losses = on_ranks(ranks, "random_losses", options, steps, replicas, 5, 10)[0]
    assert losses[-1] < losses[0] - 0.3
    assert difference(losses, ranks, options) <= 1e-4


def test_bf16():
    options = {"ep": 2, "bf16": True}
    assert difference(on_ranks(2, "random_losses", options, SHORT, 4, 5, 10)[0], 2, options) <= 2e-2


@pytest.mark.parametrize("ranks", [2, 4])
def test_over_collectives(ranks):
    options = {"ep": ranks}
    losses = on_ranks(ranks, "random_losses", options, 12, 4, 3, 6, transport="collective")[0]
    assert difference(losses, ranks, options) <= 1e-4


@pytest.mark.parametrize("place", ["affinity", "history"])
def test_sequence_placement_keeps_the_loss(place):
    options = {"ep": 2}
    losses = on_ranks(2, "random_losses", options, SHORT, 4, 5, 10, place=place)[0]
    assert difference(losses, 2, options) <= 1e-4


@pytest.mark.parametrize("mistake", ["replica gradient not summed", "moment not moved"])
def test_planted_mistakes_are_seen(mistake):
    options = {"ep": 2}
    losses = on_ranks(2, "random_losses", options, 40, 4, 5, 10, planted=mistake)[0]
    assert difference(losses, 2, options) > 1e-3


def test_the_real_planner():
    options = {"ep": 2}
    results = on_ranks(2, "planned_run", options, 24, 8)
    assert results[0]["hash"] == results[1]["hash"]
    assert difference(results[0]["losses"], 2, options) <= 1e-4
    replans = [event for event in results[0]["events"] if event["event"] == "replan"]
    assert len(replans) == 3
    assert all(event["planned_us"] <= event["current_us"] and event["reason"] for event in replans)


def test_a_dead_planner_changes_nothing():
    options = {"ep": 2}
    results = on_ranks(2, "run_with_a_dead_planner", options)
    for result in results:
        assert result["unchanged"]
        assert [event["event"] for event in result["events"]] == ["interval", "planner failed"]
        assert difference(result["losses"], 2, options) <= 1e-4
    assert "code -9" in results[0]["events"][1]["reason"]  # the rank that had the planner says why


def test_replicas_follow_the_optimizer_without_step_done():
    for losses in on_ranks(2, "run_without_step_done", {"ep": 2}):
        assert losses == pytest.approx(stock(2, '{"ep": 2}', 4), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": True, "overlap": True}, {"recompute": True}], ids=str)
def test_a_step_that_is_repeated_counts_once(options):
    setup = {"ep": 2, **options}
    for once, twice in zip(*(on_ranks(2, "repeated_steps", setup, 6, repeat=repeat) for repeat in (False, True)), strict=True):
        assert twice == once
        assert once["sent"] == 6 * 2  # once for each step and layer
        assert once["losses"] == pytest.approx(stock(2, json.dumps(setup), 6), abs=1e-6)


def test_sequences_of_a_repeated_step_are_learnt_once():
    for once, twice in zip(*(on_ranks(2, "repeated_steps", {"ep": 2}, 9, repeat=r, place="affinity") for r in (False, True)), strict=True):
        assert twice["counted"] == once["counted"] and once["counted"]["learnt"] > 0


def test_an_interval_ends_although_its_iteration_was_skipped():
    assert on_ranks(2, "iterations_left_out", {"ep": 2}) == [[5, 9], [5, 9]]


def test_different_plans_are_refused_by_rank():
    for message in on_ranks(2, "plans_that_differ", {"ep": 2}):
        assert "rank 1 disagrees with rank 0: it has the plan" in message


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": True}], ids=str)
def test_checkpoints_are_in_logical_order(tmp_path, options):
    setup = {"ep": 2, **options}
    losses, plan_hash = on_ranks(2, "save_live", setup, tmp_path)[0]
    assert load_plan(tmp_path / "iter_0000004" / "scalemoe_plan.json").content_hash == plan_hash
    resumed, resumed_hash, events = on_ranks(2, "resume_live", setup, tmp_path)[0]
    assert events == [] and resumed_hash == plan_hash
    assert resumed == pytest.approx(losses, abs=1e-6)
    assert on_ranks(2, "resume_stock", setup, tmp_path)[0] == pytest.approx(losses, abs=1e-5)
    assert on_ranks(2, "resume_stock", {"ep": 1, **options}, tmp_path)[0] == pytest.approx(losses, abs=1e-5)
