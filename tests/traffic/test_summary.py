"""The statistics of a trace, against their definitions in plain Python."""

import json
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.traffic.summary import gini, summarize, total_variation
from megatron_scalemoe.traffic.trace import RoutingTrace


def gini_by_definition(load: list[float]) -> float:
    """Half the mean absolute difference of all pairs, over the mean."""
    total = sum(load)
    return sum(abs(a - b) for a in load for b in load) / (2 * len(load) * total) if total else 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12))
def test_gini_is_half_the_mean_difference(load):
    assert gini(np.array(load, dtype=float)) == pytest.approx(gini_by_definition(load), abs=1e-12)


def variation(first: list[float], second: list[float]) -> float:
    return 0.5 * sum(abs(a / sum(first) - b / sum(second)) for a, b in zip(first, second, strict=True))


def test_every_number_follows_its_definition():
    counts = np.random.default_rng(0).integers(0, 9, size=(7, 3, 2, 6))
    counts[:, 1, :, 4] = 0
    summary = summarize(RoutingTrace(counts, meta={"topk": 2}))
    assert (summary["steps"], summary["layers"], summary["ranks"], summary["experts"]) == (7, 3, 2, 6)
    assert summary["tokens_per_step"] == pytest.approx(counts.sum() / 7 / 3 / 2)
    assert summary["coactivation"] is False
    for layer, ours in enumerate(summary["per_layer"]):
        loads = [counts[s, layer].sum(axis=0).tolist() for s in range(7)]
        assert ours["layer"] == layer
        assert ours["gini"] == pytest.approx(mean(map(gini_by_definition, loads)))
        assert ours["max_over_mean_experts"] == pytest.approx(mean(max(x) / mean(x) for x in loads))
        assert ours["max_over_mean_ranks"] == pytest.approx(mean(2 * max(sum(x[:3]), sum(x[3:])) / sum(x) for x in loads))
        assert ours["top5_share"] == pytest.approx(mean((sum(x) - min(x)) / sum(x) for x in loads))
        assert ours["dead_experts"] == pytest.approx(sum(x.count(0) for x in loads) / 42)
        assert ours["drift_1"] == pytest.approx(mean(variation(a, b) for a, b in zip(loads[1:], loads[:-1], strict=True)))
        assert ours["drift_5"] == pytest.approx(mean(variation(loads[s + 5], loads[s]) for s in range(2)))
        assert ours["drift_50"] is None
        sources = counts[:, layer].sum(axis=0).tolist()
        everyone = [a + b for a, b in zip(*sources, strict=True)]
        assert ours["source_variation"] == pytest.approx(mean(variation(x, everyone) for x in sources))
        assert ours["local_share"] == pytest.approx((sum(sources[0][:3]) + sum(sources[1][3:])) / sum(everyone))
    assert summary["total"]["gini"] == pytest.approx(mean(one["gini"] for one in summary["per_layer"]))
    assert summary["total"]["drift_50"] is None


def test_steps_and_layers_without_tokens_change_no_mean():
    counts = np.random.default_rng(0).integers(1, 9, size=(4, 2, 2, 6))
    plain = summarize(RoutingTrace(counts, meta={"topk": 2}))
    with_gaps = np.zeros((7, 3, 2, 6), dtype=int)
    with_gaps[:4, :2] = counts
    gaps = summarize(RoutingTrace(with_gaps, meta={"topk": 2}))
    assert (gaps["idle_steps"], gaps["empty_layers"]) == (3, 1)
    assert (plain["idle_steps"], plain["empty_layers"]) == (0, 0)
    assert gaps["total"] == pytest.approx(plain["total"])
    assert gaps["tokens_per_step"] == plain["tokens_per_step"]
    assert set(gaps["per_layer"][2].values()) == {2, None}
    with_gaps[1] = 0
    assert summarize(RoutingTrace(with_gaps))["total"]["drift_1"] == pytest.approx(
        mean(variation(*(counts[s, layer].sum(axis=0).tolist() for s in (2, 3))) for layer in range(2))
    )


def test_a_trace_without_any_tokens_still_has_a_summary():
    assert summarize(RoutingTrace(np.zeros((3, 2, 2, 4), dtype=int)))["total"]["max_over_mean_experts"] == 0


def test_the_noise_is_what_repeated_draws_differ_by():
    rng = np.random.default_rng(1)
    share = rng.dirichlet(np.full(16, 0.7))
    counts = rng.multinomial(500, share, size=(300, 1, 4))
    total = summarize(RoutingTrace(counts))["total"]
    assert total["drift_noise"] == pytest.approx(total["drift_1"], rel=0.05)
    few = summarize(RoutingTrace(counts[:1]))["total"]
    assert few["source_noise"] == pytest.approx(few["source_variation"], rel=0.5)
    assert few["source_noise"] > 5 * total["source_noise"]


def test_a_trace_of_nothing_has_numbers_too():
    summary = summarize(RoutingTrace(np.zeros((2, 1, 2, 3), dtype=int)))
    assert summary["total"]["gini"] == 0
    assert summary["total"]["dead_experts"] == 1
    assert summary["total"]["max_over_mean_ranks"] is None
    assert summary["total"]["local_share"] is None
    json.dumps(summary, allow_nan=False)


def test_total_variation_is_the_fraction_that_moved():
    assert total_variation(np.array([0.5, 0.5, 0]), np.array([0.2, 0.5, 0.3])) == pytest.approx(0.3)
