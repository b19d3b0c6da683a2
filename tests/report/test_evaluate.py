import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.report.evaluate import evaluate_plans
from tests.report import small_run


def evaluate(topology, plans):
    names = []
    return evaluate_plans(small_run.trace(), topology, plans, CostModel(), progress=names.append), names


def test_contiguous_comes_first_and_loads_are_the_traces():
    (contiguous, plan), names = evaluate(None, {"p": small_run.plan()})
    assert names == ["contiguous", "p"]
    mean_LE = small_run.trace().counts.sum(axis=2).mean(axis=0)
    np.testing.assert_allclose(contiguous.load, mean_LE.reshape(2, 4, 2).sum(axis=2), atol=2)
    np.testing.assert_allclose(plan.load.sum(axis=1), mean_LE.sum(axis=1), atol=4)
    assert (contiguous.max_over_mean > 2).all()
    assert (plan.max_over_mean < 1.02).all()


def test_with_a_topology_sums_over_layers_are_those_of_layer_cost():
    (_, plan), _ = evaluate(small_run.topology(), {"p": small_run.plan()})
    layers = plan_cost(small_run.plan(), small_run.trace(), Links(small_run.topology()), CostModel()).layers
    assert plan.total_us == pytest.approx(sum(layer.total_us for layer in layers))
    np.testing.assert_allclose(plan.link_us, sum(layer.busy_us_X for layer in layers))


def test_without_a_topology_there_are_loads_only():
    (contiguous,), _ = evaluate(None, {})
    assert contiguous.link_us is None
    assert contiguous.total_us is None


def test_a_layer_without_tokens_is_balanced():
    trace = small_run.trace()
    counts = trace.counts.copy()
    counts[:, 1] = 0
    empty = type(trace)(counts, meta=trace.meta)
    (contiguous,) = evaluate_plans(empty, None, {}, CostModel(), progress=lambda _: None)
    assert contiguous.max_over_mean[1] == 1.0
