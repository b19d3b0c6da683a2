"""The picture of a trace: what its title, axes and pixels say."""

import sys

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.report.figures.trace import trace_figure
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import RoutingTrace


def test_the_title_states_the_finding():
    counts = np.zeros((1, 1, 1, 10), dtype=int)
    counts[0, 0, 0, :6] = [50, 10, 10, 10, 10, 10]
    title = trace_figure(RoutingTrace(counts)).get_suptitle()
    assert title == "The busiest of 10 experts gets 5.0x the mean load, five get 90 % of all selections, 40 % get none"
    assert trace_figure(RoutingTrace(counts[..., :4])).get_suptitle() == "The busiest of 4 experts gets 2.5x the mean load"


def test_the_heat_map_shows_loads_relative_to_the_mean_of_each_layer():
    counts = np.array([[[[1, 0, 3, 4]], [[60, 20, 0, 0]]]])
    heat, curve, bar = trace_figure(RoutingTrace(counts)).axes
    shown = heat.images[0].get_array()
    np.testing.assert_allclose(shown.filled(0), [[0.5, 0, 1.5, 2], [3, 1, 0, 0]])
    np.testing.assert_array_equal(shown.mask, [[False, True, False, False], [False, False, True, True]])
    assert (heat.get_xlabel(), heat.get_ylabel(), bar.get_ylabel()) == ("expert", "layer", "load / mean load of the layer")
    assert (curve.get_xlabel(), curve.get_ylabel()) == ("experts, the most loaded first", "load / mean load")
    np.testing.assert_allclose(curve.lines[2].get_ydata(), [2.5, 1.25, 0.25, 0])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 5), (1, 40, 2, 64)])
def test_any_shape_can_be_drawn(shape, tmp_path):
    steps, layers, ranks, experts = shape
    trace = synthesize(steps=steps, layers=layers, ranks=ranks, experts=experts, topk=1)
    for drawn in (trace, RoutingTrace(np.zeros(shape, dtype=int))):
        trace_figure(drawn).savefig(tmp_path / "p.svg")
        assert (tmp_path / "p.svg").stat().st_size > 1000


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ScaleMoEError, match=r"pip install 'megatron-scalemoe\[report\]'"):
        trace_figure(synthesize())
