import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.simulate.engine import Replanning, replanned, replay
from megatron_scalemoe.traffic.trace import RoutingTrace
from tests.cost.cluster import equal_nodes, star_cluster

COST = CostModel(hidden_size=64, ffn_hidden_size=32, gpu_TFLOPs=0.01, micro_batches=2)
# Random links, so that the way there and the way back differ.
LINKS = Links(star_cluster(equal_nodes(2, 2), seed=5))
SUMMARY_KEYS = (
    "step_us dispatch_us combine_us compute_us replica_us max_over_mean_mean max_over_mean_p95 bytes_scale_out bytes_scale_up wait_share "
    "migrated_bytes migration_us replans steps warm_up_steps idle_steps"
)


def small_trace(steps: int = 5, layers: int = 3, ranks: int = 4, experts: int = 8) -> RoutingTrace:
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(experts, 0.4), size=layers)
    counts = np.stack([rng.multinomial(200, popularity[layer], size=(steps, ranks)) for layer in range(layers)], axis=1)
    return RoutingTrace(counts.astype(np.int32), meta={"topk": 2})


def plan_with_replicas(seed: int, layers: int = 3) -> PlacementPlan:
    rng = np.random.default_rng(seed)
    home_rank = np.stack([rng.permutation(np.repeat(np.arange(4), 2)) for _ in range(layers)])
    hosts = home_rank[:, :, None] == np.arange(4)
    for layer in range(layers):
        for rank in range(4):
            hosts[layer, rng.choice(np.flatnonzero(~hosts[layer, :, rank])), rank] = True
    return PlacementPlan.from_hosts(home_rank, hosts, replica_slots_per_rank=1)


@pytest.mark.parametrize("even", [False, True])
def test_a_replay_costs_what_its_steps_and_layers_cost_one_by_one(even):
    trace, plan = small_trace(), plan_with_replicas(1)
    replayed = replay(trace, plan, LINKS, COST, even=even)
    for step in range(trace.num_steps):
        for layer, alone in enumerate(plan_cost(plan, trace, LINKS, COST, steps=slice(step, step + 1), even=even).layers):
            for name in ("dispatch_us", "combine_us", "compute_us", "replica_us", "total_us", "bytes_scale_out", "max_over_mean"):
                assert getattr(replayed, name)[step, layer] == pytest.approx(getattr(alone, name), rel=1e-12), name
            np.testing.assert_array_equal(replayed.load[step, layer], alone.load_G)
            wait_us = [(max(alone.load_G) - own) * COST.compute_us_per_row for own in alone.load_G]
            np.testing.assert_allclose(replayed.wait_us[step, layer], wait_us)


def test_summary_has_the_stable_keys_and_adds_up():
    replayed = replay(small_trace(), plan_with_replicas(1), LINKS, COST)
    summary = replayed.summary()
    assert sorted(summary) == sorted(SUMMARY_KEYS.split())
    parts = ("dispatch_us", "combine_us", "compute_us", "replica_us")
    assert summary["step_us"] == pytest.approx(sum(summary[name] for name in parts))
    assert summary["step_us"] == pytest.approx(replayed.total_us.sum() / 5)
    assert summary["max_over_mean_p95"] >= summary["max_over_mean_mean"] >= 1
    assert summary["wait_share"] == pytest.approx(replayed.wait_us.sum() / 4 / replayed.total_us.sum())
    assert (summary["steps"], summary["warm_up_steps"], summary["replans"], summary["migrated_bytes"]) == (5, 0, 0, 0)


def test_warm_up_steps_are_left_out_of_the_summary_but_counted():
    trace, plan = small_trace(), plan_with_replicas(2)
    whole = replay(trace, plan, LINKS, COST, warm_up_steps=2)
    later = replay(dataclasses.replace(trace, counts=trace.counts[2:]), plan, LINKS, COST)
    assert whole.summary() == {**later.summary(), "warm_up_steps": 2}


def test_steps_without_tokens_are_left_out_of_the_summary():
    trace, plan = small_trace(), plan_with_replicas(2)
    with_idle = dataclasses.replace(trace, counts=np.insert(trace.counts, [1, 5], 0, axis=0))
    assert replay(with_idle, plan, LINKS, COST).summary() == {**replay(trace, plan, LINKS, COST).summary(), "idle_steps": 2}
    empty_layer = dataclasses.replace(trace, counts=trace.counts * np.array([1, 0, 1], dtype=np.int32)[:, None, None])
    summary, replayed = (r := replay(empty_layer, plan, LINKS, COST)).summary(), r
    assert summary["max_over_mean_mean"] == pytest.approx(replayed.max_over_mean[:, [0, 2]].mean())


def test_balancing_the_copies_is_never_worse_than_splitting_evenly():
    trace, plan = small_trace(), plan_with_replicas(3)
    balanced = replay(trace, plan, LINKS, COST).max_over_mean
    even = replay(trace, plan, LINKS, COST, even=True).max_over_mean
    assert (balanced <= even * 1.01).all() and balanced.mean() < even.mean()


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 11), st.integers(1, 5))
def test_each_step_runs_under_the_newest_plan_made_from_counts_at_least_lag_steps_old(steps, every, lag, history):
    if lag >= steps:
        lag = steps - 1
    trace, start = small_trace(steps, 1), plan_with_replicas(0, 1)
    seen = []

    def planner(given_trace, known, previous):
        assert given_trace is trace and previous is (seen[-1][1] if seen else start)
        seen.append((known, plan_with_replicas(len(seen) + 1, 1)))
        return seen[-1][1]

    plans = list(replanned(trace, start, planner, Replanning(every=every, lag=lag, history=history)))
    for step, plan in enumerate(plans):
        newest = max((s for s in range(lag, step + 1) if (s - lag) % every == 0), default=None)
        if newest is None:
            assert plan is start
            continue
        known, expected = seen[(newest - lag) // every]
        assert plan is expected
        assert list(range(steps))[known] == list(range(steps))[: newest - lag + 1][-history:]


def test_replanning_counts_changed_plans_and_moved_homes_only():
    trace, start = small_trace(6), PlacementPlan.contiguous(3, 4, 8)
    home_rank = start.home_rank.copy()
    home_rank[1, [0, 7]] = home_rank[1, [7, 0]]
    swapped = PlacementPlan.from_hosts(home_rank, home_rank[:, :, None] == np.arange(4), replica_slots_per_rank=0)
    plans = replanned(trace, start, lambda *_: PlacementPlan(swapped.physical_to_logical, 4, 8), Replanning(every=1, lag=2, history=1))
    replayed = replay(trace, plans, LINKS, COST, warm_up_steps=2)
    moved = 2 * COST.expert_parameters * 14
    assert replayed.migrated_bytes.tolist() == [0, 0, moved, 0, 0, 0]
    assert (replayed.replans, replayed.summary()["migrated_bytes"]) == (1, moved)
    assert np.flatnonzero(replayed.migration_us).tolist() == [2]
    assert replayed.summary()["migration_us"] == replayed.migration_us[2]


def test_progress_is_told_after_every_step():
    told = []
    replay(small_trace(3), PlacementPlan.contiguous(3, 4, 8), LINKS, COST, progress=told.append)
    assert told == [1, 2, 3]


@pytest.mark.parametrize(("every", "lag", "history"), [(0, 1, 1), (1, -1, 1), (1, 1, 0), (1, 5, 1)])
def test_a_schedule_that_cannot_be_is_refused(every, lag, history):
    with pytest.raises(ScaleMoEError, match="must be"):
        replanned(small_trace(5), PlacementPlan.contiguous(3, 4, 8), lambda *_: None, Replanning(every=every, lag=lag, history=history))


@pytest.mark.parametrize(("layers", "ranks", "experts"), [(2, 4, 8), (3, 2, 8), (3, 4, 16)])
def test_a_plan_for_something_else_is_refused_with_both_sizes(layers, ranks, experts):
    plan = PlacementPlan.contiguous(layers, ranks, experts)
    with pytest.raises(ScaleMoEError, match=rf"3 layers, 4 ranks and 8 experts[^$]*found: {layers} layers, {ranks} ranks and {experts}"):
        replay(small_trace(), plan, LINKS, COST)


def test_a_topology_of_other_size_is_refused():
    larger = star_cluster(equal_nodes(2, 3))
    with pytest.raises(ScaleMoEError, match=r"topology must be for the 4 ranks[^$]*found: 6 ranks"):
        replay(small_trace(), PlacementPlan.contiguous(3, 4, 8), Links(larger), COST)
