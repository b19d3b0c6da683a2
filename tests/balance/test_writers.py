"""Figures and events in Megatron's writers and on the terminal."""

import pytest

from megatron_scalemoe.balance import writers
from megatron_scalemoe.balance.metrics import LayerFigures

FIGURES = [LayerFigures(2, 1.5, 3 << 20, 0.25, 0.0, 1, 2), LayerFigures(4, 1.1, None, None, 0.1, 0, 3)]


class Recorder:
    def __init__(self):
        self.scalars, self.texts, self.logs = {}, [], []

    def add_scalar(self, name, value, iteration):
        self.scalars[name, iteration] = value

    def add_text(self, name, text, iteration):
        self.texts.append((name, text, iteration))

    def log(self, values, iteration):
        self.logs.append((values, iteration))


@pytest.mark.parametrize("per_layer", [False, True])
def test_writers(per_layer):
    tensorboard, wandb = Recorder(), Recorder()
    writers.write_figures(tensorboard, wandb, FIGURES, 7, per_layer=per_layer)
    event = {"event": "planner failed", "iteration": 6, "reason": "no memory", "took_s": 0.5}
    writers.write_events(tensorboard, wandb, [event], 7)
    writers.write_figures(None, None, FIGURES, 7, per_layer=per_layer)
    scalars = tensorboard.scalars
    assert scalars["scalemoe/max_over_mean", 7] == pytest.approx(1.3)
    assert scalars["scalemoe/max_over_mean_worst", 7] == 1.5
    assert scalars["scalemoe/max_over_mean/layer_4", 7] == 1.1
    assert scalars["scalemoe/sent_bytes", 7] == 3 << 20  # of the layer that knows
    assert scalars["scalemoe/homes_moved", 7] == 5
    assert (("scalemoe/drop_rate/layer_4", 7) in scalars) == per_layer
    assert scalars["scalemoe/planner_failed", 6] == 1
    assert scalars["scalemoe/planner_failed/took_s", 6] == 0.5
    [(name, text, iteration)] = tensorboard.texts
    assert (name, iteration) == ("scalemoe/events", 6) and "no memory" in text
    in_wandb = {name: value for values, _ in wandb.logs for name, value in values.items()}
    assert in_wandb == {name: value for (name, _), value in scalars.items()}
    assert {at for _, at in wandb.logs} == {7}  # it takes no earlier iterations


def test_table():
    *_, first, second = writers.format_figures(FIGURES, 300).splitlines()
    assert first.split() == ["2", "1.500", "3.0", "MiB", "25.0%", "0.0%", "1", "2"]
    assert second.split() == ["4", "1.100", "-", "-", "10.0%", "0", "3"]


EVENTS = [
    {"event": "interval", "iteration": 20, "steps": 10, "max_over_mean": 1.25, "max_over_mean_p95": 1.5, "step_ms": 30.0}
    | {"replica_ms": 1.0, "exposed_ms": 0.5, "local_share": 0.3, "uniform_share": 0.25, "default_share": 0.26, "placed_share": 0.31}
    | {"placing_ms": 2.0, "pays": False},
    {"event": "replan", "iteration": 21, "changed": False, "reason": "saves 1 %"},
    {"event": "migration failed", "reason": "rank 1: no memory"},
]


def test_every_event_has_its_line():
    interval, stays, failed = (writers.event_text(event) for event in EVENTS)
    assert "iterations 11 to 20" in interval and "max/mean 1.250" in interval and "0.300, 1.20 x uniform" in interval
    assert "sequences stay" in interval
    assert "the plan stays: saves 1 %" in stays
    assert "the old plan stays: rank 1: no memory" in failed
