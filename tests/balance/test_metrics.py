"""Figures of each layer, against a count of the same steps by hooks."""

import pytest

from megatron_scalemoe.config import ScaleMoEConfig
from tests.rank_pool import pool


def measured(setup: dict, config: ScaleMoEConfig, place: bool) -> tuple[list[dict], dict]:
    from tests.balance import metrics_case

    return metrics_case.measured(metrics_case.Setup(**setup), config, place)


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
    (figures, counted), *others = pool(ranks).run(measured, setup, config, place)
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
    if case == "capacity":
        for layer, kept in zip(figures, counted["kept"], strict=True):
            assert layer["drop_rate"] == pytest.approx(1 - kept / (TOKENS * 2 * STEPS))  # top-2
    moved = [(layer["replicas"], layer["homes_moved"]) for layer in figures]
    assert all(replicas == 2 and homes > 0 for replicas, homes in moved) if place else moved == [(0, 0)] * 2


def test_with_expert_tensor_parallelism_a_kept_row_counts_once():
    from types import SimpleNamespace

    from megatron_scalemoe.balance.metrics import LayerMeter

    meter = LayerMeter.__new__(LayerMeter)
    meter._groups = SimpleNamespace(expert_tp=SimpleNamespace(size=lambda: 2), stage=SimpleNamespace(size=lambda: 4))
    meter._sizes = SimpleNamespace(hidden_size=8, dtype=SimpleNamespace(itemsize=2), pads_to_capacity=False)
    load, selections, stayed, left, padding, replicas, homes_moved = [5, 3], 4, 2, 4, 2, 0, 0
    figures = meter._figures(1, [*load, selections, stayed, left, padding, replicas, homes_moved], 1)
    assert figures.drop_rate == 1 / 4
    assert figures.sent_bytes == 2 * left * 16 / 4
    assert figures.local_share == 2 / 6


def test_the_load_of_a_step_is_of_that_step_alone(monkeypatch):
    from types import SimpleNamespace

    import torch

    from megatron_scalemoe.balance.metrics import StepMeter

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    dispatcher = SimpleNamespace(rows_computed=0)
    layer = SimpleNamespace(layer=SimpleNamespace(token_dispatcher=dispatcher), replica_time_s=0.0)
    meter = StepMeter([layer], SimpleNamespace(stage=None))
    meter._load = lambda rows_SL: torch.stack([rows_SL, torch.full_like(rows_SL, 4)], dim=2)  # another rank computes four rows a step
    for _ in range(3):
        dispatcher.rows_computed += 4
        meter.end_step()
    assert meter.gather(3)["max_over_mean"] == 1.0
