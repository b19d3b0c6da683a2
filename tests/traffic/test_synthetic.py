"""Synthetic traces have the skew, drift and affinities that they promise."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic import matrices, synthetic
from megatron_scalemoe.traffic.matrices import COACTIVATION_BYTES, distinct_factor
from megatron_scalemoe.traffic.summary import gini, summarize
from megatron_scalemoe.traffic.synthetic import DEFAULTS, synthesize
from megatron_scalemoe.traffic.trace import RoutingTrace

MANY = 2_000_000


def assert_tokens_choose_topk_distinct_experts(trace: RoutingTrace) -> None:
    tokens = trace.meta["tokens_per_rank"]
    assert (trace.counts.sum(axis=3) == tokens * trace.topk).all()
    assert trace.counts.max() <= tokens
    if trace.coactivation is not None:
        load_LE = trace.counts.sum(axis=(0, 2))
        np.testing.assert_array_equal(np.diagonal(trace.coactivation, axis1=1, axis2=2), load_LE)
        excess_LE = trace.coactivation.sum(axis=2) - trace.topk * load_LE
        assert np.abs(excess_LE).max() <= 0.01 * trace.topk * load_LE.max()


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_kind_is_consistent_and_repeatable(kind):
    trace = synthesize(kind, seed=3)
    assert_tokens_choose_topk_distinct_experts(trace)
    assert trace.coactivation is not None
    assert trace.meta["source"] == f"synthetic {kind}"
    again = synthesize(kind, seed=3)
    assert trace.content_hash == again.content_hash
    assert trace.meta == again.meta
    assert synthesize(kind, seed=4).content_hash != trace.content_hash


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(DEFAULTS)),
    *(st.integers(1, n) for n in (5, 20, 3, 6, 4, 40)),
    st.floats(0, 3),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_odd_sizes_are_consistent_too(kind, ranks, experts, layers, topk, steps, tokens, skew, affinity, own, seed):
    shape = {"ranks": ranks, "experts": experts, "layers": layers, "topk": min(topk, experts), "steps": steps, "tokens_per_rank": tokens}
    shape |= {"affinity": affinity, "source_affinity": own, "skew": None if kind == "recorded" else skew, "drift": 0.0}
    trace = synthesize(kind, **shape, seed=seed, coactivation=False)
    assert trace.counts.shape == (steps, layers, ranks, experts)
    assert_tokens_choose_topk_distinct_experts(trace)


# (experts, exponent): Gini, max/mean, share of the five busiest, as in docs/planner.md.
ZIPF_FIGURES = {
    (32, 0.2): (0.10, 1.6, 0.21),
    (32, 1.5): (0.76, 14.2, 0.78),
    (128, 1.0): (0.64, 23.6, 0.42),
    (256, 1.0): (0.68, 41.8, 0.37),
}


@pytest.mark.parametrize(("size", "figures"), ZIPF_FIGURES.items())
def test_zipf_exponents_give_the_published_skew(size, figures):
    trace = synthesize("zipf", ranks=1, experts=size[0], topk=2, steps=1, tokens_per_rank=MANY, skew=size[1])
    total = summarize(trace)["total"]
    assert total["gini"] == pytest.approx(figures[0], abs=0.015)
    assert total["max_over_mean_experts"] == pytest.approx(figures[1], rel=0.03)
    assert total["top5_share"] == pytest.approx(figures[2], abs=0.012)


@pytest.mark.parametrize("drift", [0.01, 0.05, 0.15])
def test_drift_is_the_measured_total_variation_per_step(drift):
    trace = synthesize("zipf", layers=3, steps=10, tokens_per_rank=MANY, drift=drift)
    for one in summarize(trace)["per_layer"]:
        assert one["drift_1"] == pytest.approx(drift, rel=0.05)
        assert one["drift_5"] > 1.5 * drift


def test_sampling_adds_its_noise_to_the_drift():
    total = summarize(synthesize("zipf", layers=4, steps=20, tokens_per_rank=500, drift=0.0))["total"]
    assert total["drift_1"] == pytest.approx(total["drift_noise"], rel=0.1)
    assert total["source_variation"] == pytest.approx(total["source_noise"], rel=0.1)


def test_recorded_is_as_skewed_and_restless_as_the_recorded_run():
    # The statistics of that run in docs/planner.md.
    trace = synthesize("recorded", steps=201)
    assert trace.counts.shape == (201, 8, 16, 32)
    assert trace.iterations[:3] == [0, 10, 20]
    summary = summarize(trace)
    total, layers = summary["total"], summary["per_layer"]
    assert 0.77 <= total["gini"] <= 0.83
    assert 11 <= total["max_over_mean_experts"] <= 13
    assert 0.75 <= total["top5_share"] <= 0.89
    ginis = [one["gini"] for one in layers]
    assert ginis[0] == pytest.approx(0.92, abs=0.03)
    assert ginis[-1] == pytest.approx(0.59, abs=0.03)
    assert np.diff(ginis).max() < 0.02
    assert all(0.08 <= one["dead_experts"] <= 0.52 for one in layers)
    assert all(0.02 <= one["drift_1"] <= 0.07 for one in layers)
    assert all(0.03 <= one["drift_50"] <= 0.2 for one in layers)
    assert 1.5 <= total["drift_50"] / total["drift_1"] <= 3
    assert 5.5 <= total["max_over_mean_ranks"] <= 7
    assert total["local_share"] == pytest.approx(1 / 16, abs=0.001)


def partners_share(trace: RoutingTrace, partners: int) -> float:
    """How much of an expert's co-activation its likeliest partners have, on average."""
    pairs = trace.layer(0).coactivation
    return float((np.sort(pairs, axis=1)[:, -partners:].sum(axis=1) / pairs.sum(axis=1)).mean())


def test_affinity_brings_the_experts_of_a_group_together():
    even = {"skew": 0.0, "drift": 0.0, "source_affinity": 0.0, "topk": 3}
    shares = [partners_share(synthesize("clustered", affinity=a, **even), 7) for a in (0.0, 0.5, 1.0)]
    assert shares[0] == pytest.approx(7 / 63, abs=0.01)
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.2
    assert shares[2] == pytest.approx(1.0)


def test_grouped_placement_saves_rows_and_contiguous_placement_does_not():
    traffic = synthesize("clustered", experts=16, groups=2, affinity=0.9, skew=0.0, topk=4).layer(0)
    partner_EE = traffic.coactivation > np.median(traffic.coactivation)
    group_E = partner_EE[0] | (np.arange(16) == 0)
    assert group_E.sum() == 8
    grouped = distinct_factor(np.stack([group_E, ~group_E], axis=1).astype(float), traffic)
    contiguous = distinct_factor(np.repeat(np.eye(2), 8, axis=0), traffic)
    assert grouped.mean() < 0.8 * contiguous.mean()


def test_source_affinity_makes_ranks_differ_and_keeps_the_skew():
    traces = [synthesize("clustered", ranks=8, affinity=1.0, source_affinity=own, drift=0.0) for own in (0.0, 0.3, 0.9)]
    totals = [summarize(trace)["total"] for trace in traces]
    assert totals[0]["source_variation"] == pytest.approx(totals[0]["source_noise"], rel=0.2)
    assert totals[0]["source_variation"] + 0.1 < totals[1]["source_variation"] < totals[2]["source_variation"] - 0.3
    assert totals[1]["gini"] == pytest.approx(gini(traces[0].counts.sum(axis=(0, 1, 2))), abs=0.1)


def test_bursts_come_and_go():
    trace = synthesize("bursty", experts=32, steps=100, skew=0.3, drift=0.005, tokens_per_rank=20000)
    load_SE = trace.counts[:, 0].sum(axis=1)
    jumps_SE = load_SE[1:] / load_SE[:-1]
    assert 10 <= (jumps_SE > 3).sum() <= 60
    assert abs((jumps_SE > 3).sum() - (jumps_SE < 1 / 3).sum()) <= 5
    assert np.median(np.abs(jumps_SE - 1)) < 0.1


@pytest.mark.parametrize("topk", [2, 6])
def test_every_token_chooses_the_single_hot_expert(topk):
    load_LE = synthesize("single_hot", layers=3, topk=topk).counts.sum(axis=(0, 2))
    tokens = 8 * 8 * 4096
    assert (load_LE.max(axis=1) >= 0.99 * tokens).all()
    assert np.sort(load_LE, axis=1)[:, -2].max() < 0.2 * tokens
    assert len(set(load_LE.argmax(axis=1))) > 1


def test_coactivation_is_left_out_where_it_is_large_or_says_nothing(monkeypatch):
    assert COACTIVATION_BYTES == 64 * 2**20
    monkeypatch.setattr(matrices, "COACTIVATION_BYTES", 8 * 3 * 16**2)
    small = {"ranks": 2, "steps": 1, "tokens_per_rank": 64, "experts": 16}
    assert synthesize(**small, layers=4).coactivation is None
    assert synthesize(**small, layers=3).coactivation is not None
    monkeypatch.undo()
    assert synthesize(topk=1).coactivation is None
    assert synthesize(topk=1, coactivation=True).coactivation[0, 0, 1] == 0
    assert synthesize(coactivation=False).coactivation is None


@pytest.mark.parametrize(
    "sizes",
    [
        {"ranks": 64, "steps": 64},
        {"experts": 600, "layers": 4},
        {"kind": "clustered", "experts": 256, "ranks": 16, "steps": 12},
        {"kind": "recorded", "steps": 400, "layers": 12},
        {"steps": 300, "layers": 20, "ranks": 1, "coactivation": False},
    ],
)
def test_the_memory_asked_for_is_about_what_is_taken(sizes, monkeypatch):
    asked = []
    monkeypatch.setattr(synthetic, "check_memory", lambda num_bytes, *_, **__: asked.append(num_bytes))
    tracemalloc.start()
    synthesize(**sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= asked[0] * 1.02 <= 4 * peak


@pytest.mark.parametrize(
    "sizes",
    [{"steps": 10**9}, {"ranks": 10**6, "steps": 10**6, "tokens_per_rank": 1}, {"experts": 65_536, "coactivation": True, "layers": 99}],
)
def test_sizes_beyond_memory_are_named_before_anything_is_made(sizes):
    with pytest.raises(ScaleMoEError, match="must fit in memory") as caught:
        synthesize(**sizes)
    assert all(f"{name} {size}" in caught.value.problem for name, size in sizes.items() if name in ("steps", "ranks", "experts"))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"experts": 100_000}, "experts: must be at most 65536"),
        ({"kind": "nonsense"}, "kind: must be one of zipf"),
        ({"ranks": 0}, "ranks: must be 1 or more"),
        ({"topk": 65}, "topk: must be at most the number of experts"),
        ({"skew": -0.1}, "skew: must be from 0"),
        ({"skew": float("nan")}, "skew: must be from 0"),
        ({"drift": 1.1}, "drift: must be from 0 to 1"),
        ({"drift": 0.95}, "drift: this popularity cannot change by a total variation of 0.95"),
        ({"groups": 65}, "groups: must be from 1 to the 64 experts"),
        ({"tokens_per_rank": 2**28}, "must fit int32"),
        ({"kind": "recorded", "skew": 1.0}, "skew: does not apply"),
        ({"kind": "single_hot", "drift": 0.1}, "drift: does not apply"),
    ],
)
def test_parameters_out_of_range_are_named(parameters, message):
    with pytest.raises(ScaleMoEError, match=message):
        synthesize(**parameters)
