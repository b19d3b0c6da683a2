"""Figures of each layer, against a count of the same steps by hooks; and how they look in the writers and on the terminal."""

import pytest

from megatron_scalemoe.config import ScaleMoEConfig
from tests.rank_pool import pool


def on_ranks(ranks: int, name: str, *args) -> list:
    return pool(ranks).run(_call, name, args)


def _call(name: str, args: tuple):
    from tests.balance import figures_case

    if name == "measured":
        from tests.mcore.tiny_gpt import Setup

        args = (Setup(**args[0]), *args[1:])
    return getattr(figures_case, name)(*args)


CASES = {
    "ragged": (2, dict(ep=2), ScaleMoEConfig(), False),
    "placed": (2, dict(ep=2), ScaleMoEConfig(replicas=2, replan_interval=0), True),
    "padded and dropped": (2, dict(ep=2), ScaleMoEConfig(dispatch="padded", padded_capacity_factor=1.0), False),
    "capacity": (2, dict(ep=2, capacity_factor=1.0), ScaleMoEConfig(), False),
    "expert-tensor-parallel": (4, dict(ep=2, tp=2, expert_tp=2), ScaleMoEConfig(), False),
    "pipeline": (4, dict(ep=2, pp=2), ScaleMoEConfig(replicas=2, replan_interval=0), True),
    "one rank has all": (2, dict(ep=1), ScaleMoEConfig(), False),
}
STEPS, TOKENS, ROW_BYTES = 3, 8 * 16, 32 * 4  # of tiny_gpt: tokens of a global batch, bytes of a hidden row


@pytest.mark.parametrize("case", CASES)
def test_figures_are_what_was_counted(case):
    ranks, setup, config, place = CASES[case]
    (figures, counted), *others = on_ranks(ranks, "measured", setup, config, place)
    assert all(other == figures for other, _ in others)
    assert [layer["layer"] for layer in figures] == [1, 2]
    if "pp" not in setup:  # there each rank has counted its own stage
        for layer, rows_G, left in zip(figures, counted["rows"], counted["left"], strict=True):
            assert layer["max_over_mean"] == pytest.approx(max(rows_G) * len(rows_G) / sum(rows_G))
            if case in ("ragged", "capacity", "one rank has all"):
                assert layer["sent_bytes"] == 2 * left * ROW_BYTES / ranks / STEPS
    assert all((layer["sent_bytes"] > 0) == (setup["ep"] > 1) for layer in figures)
    assert all((layer["local_share"] < 1) == (setup["ep"] > 1) and layer["local_share"] > 0 for layer in figures)
    assert (sum(layer["drop_rate"] for layer in figures) > 0.01) == ("capacity" in case or "dropped" in case)
    moved = [(layer["replicas"], layer["homes_moved"]) for layer in figures]
    assert all(replicas == 2 and homes > 0 for replicas, homes in moved) if place else moved == [(0, 0)] * 2


def test_the_drop_rate_is_what_the_router_dropped():
    ranks, setup, config, place = CASES["capacity"]
    figures, counted = on_ranks(ranks, "measured", setup, config, place)[0]
    for layer, kept in zip(figures, counted["kept"], strict=True):
        assert layer["drop_rate"] == pytest.approx(1 - kept / (TOKENS * 2 * STEPS))  # top-2


@pytest.mark.parametrize("per_layer", [False, True])
def test_writers(per_layer):
    scalars, texts, wandb = on_ranks(2, "written", per_layer)[0]
    assert scalars["scalemoe/max_over_mean", 7] == pytest.approx(1.3)
    assert scalars["scalemoe/max_over_mean_worst", 7] == 1.5
    assert scalars["scalemoe/max_over_mean/layer_4", 7] == 1.1
    assert scalars["scalemoe/sent_bytes", 7] == 1024  # of the layer that knows
    assert scalars["scalemoe/homes_moved", 7] == 5
    assert (("scalemoe/drop_rate/layer_4", 7) in scalars) == per_layer
    assert scalars["scalemoe/planner_failed", 6] == 1
    assert scalars["scalemoe/planner_failed/took_s", 6] == 0.5
    assert texts == [("scalemoe/events", " scalemoe: iteration 6: no new plan, the old one stays: no memory", 6)]
    in_wandb = {name: value for values, _ in wandb for name, value in values.items()}
    assert in_wandb == {name: value for (name, _), value in scalars.items()}
    assert {at for _, at in wandb} == {7}  # it takes no earlier iterations


def test_table():
    title, header, _, first, second = on_ranks(2, "table")[0].splitlines()
    assert title == " scalemoe: MoE layers until iteration 300"
    assert header == "layer  max/mean  sent per rank and step  local share  dropped  replicas  homes moved"
    assert first.split() == ["12", "1.500", "3.0", "MiB", "25.0%", "1.5%", "1", "2"]
    assert second.split() == ["4", "1.000", "-", "-", "-", "0", "0"]
