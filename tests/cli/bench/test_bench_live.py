"""`scalemoe bench live`: what it refuses, the figures it makes of the ranks' records, and one small run."""

import json

import numpy as np
import pytest

from megatron_scalemoe.cli.bench import live as bench_live
from megatron_scalemoe.cli.main import main


def row(variant: str, **changes) -> dict:
    names = ("max_over_mean", "max_over_mean_p95", "max_over_mean_max", "expert_ms", "expert_cpu_ms", "replica_ms", "exposed_ms")
    values = dict.fromkeys(names, 1.5)
    return {"variant": variant, **values, "step_ms": 20.0, "tokens_per_s": 1000.0, "ratio_to_stock": 0.8, "max_loss_error": 1e-6, **changes}


@pytest.fixture
def fake_ranks(monkeypatch):
    """Replaces the launch: the ranks' rows are set by the test, and their command lines are recorded."""
    calls = []

    def answer_with(rows):
        def result_of_ranks(module, arguments, **kwargs):
            calls.append((module, arguments, kwargs))
            plans = [{"waited_s": 2.0, "changed": True}, {"waited_s": 1.0, "changed": False}, {"waited_s": 4.0, "event": "planner failed"}]
            return {"rows": rows, "plans": plans}

        monkeypatch.setattr(bench_live, "result_of_ranks", result_of_ranks)
        return calls

    return answer_with


def test_the_ranks_get_every_flag(fake_ranks, capsys):
    calls = fake_ranks([row("stock")])
    assert main(["bench", "live", "--micro-batch", "3", "--zipf", "0.5", "--experts-module", "megatron", "--quiet"]) == 0
    module, arguments, kwargs = calls[0]
    assert module == "megatron_scalemoe.bench.live"
    assert kwargs == {"ranks": 4, "timeout": 3600.0, "quiet": True}
    words = " ".join(arguments)
    assert all(
        flag in words for flag in ("--ranks 4", "--experts 16", "--micro-batch 3 ", "--zipf 0.5", "--experts-module megatron", "--seed 0")
    )


@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_another_loss_fails_the_check(error, fake_ranks, capsys):
    fake_ranks([row("stock"), row("live", max_loss_error=error)])
    assert main(["bench", "live"]) == 3
    captured = capsys.readouterr()
    assert "check failed: the loss of live differs" in captured.err
    assert "variant" in captured.out


def test_figures_are_of_the_slowest_rank_after_the_warm_up():
    pytest.importorskip("torch")
    from megatron_scalemoe.bench.live import summarize

    # 2 ranks, 3 steps of which the first is warm-up, 2 calls; the hot rank of the second call is the other one
    calls_GSC3 = np.array([[[[999, 9, 9]] * 2] * 3, [[[1, 9, 9]] * 2] * 3], dtype=float)
    calls_GSC3[:, 1:] = np.array([[[30, 0.3, 0.2], [10, 0.1, 0.1]], [[10, 0.1, 0.1], [10, 0.2, 0.1]]])[:, None]
    other = {"exposed_s": np.zeros((2, 3)), "replica_s": np.array([[9, 0.002, 0.004], [9, 0.004, 0.001]])}
    stock = {"loss": np.array([[3, 2, 1], [3, 2, 3.0]]), "step_s": np.array([[9, 2, 2], [9, 1, 4.0]]), "calls_C3": calls_GSC3, **other}
    live = stock | {"loss": stock["loss"] + [[0.5, 0, 0], [0, 0, 0]], "step_s": stock["step_s"] / 2}
    figures = summarize("live", {"stock": stock, "live": live}, 1, tokens=300)
    assert (figures["max_over_mean"], figures["max_over_mean_max"], figures["steps"]) == (1.25, 1.5, 2)
    assert figures["expert_ms"] == pytest.approx(500)
    assert figures["expert_cpu_ms"] == pytest.approx(300)
    assert figures["replica_ms"] == pytest.approx(4)
    assert figures["step_ms"] == pytest.approx(1500)
    assert (figures["tokens_per_s"], figures["ratio_to_stock"]) == (pytest.approx(200), pytest.approx(0.5))
    assert (figures["max_loss_error"], figures["losses"]) == (0.25, [3.25, 2.0, 2.0])


def test_a_small_run_balances_and_keeps_the_loss(tmp_path, capfd):
    pytest.importorskip("megatron.core")
    sizes = "--ranks 2 --experts 4 --replicas 2 --hidden 64 --ffn 128 --layers 1 --seq 64 --micro-batch 4 --micro-batches 1"
    assert main(["bench", "live", *sizes.split(), "--steps", "4", "--refresh", "2", "--quiet", "-o", str(tmp_path / "r.json")]) == 0
    assert capfd.readouterr().err == ""
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["stock", "scalemoe", "live", "live, planner beside"]
    assert rows["scalemoe"]["max_over_mean"] == rows["stock"]["max_over_mean"] > 1.1
    assert rows["live"]["max_over_mean"] < rows["stock"]["max_over_mean"] - 0.05
    assert result["plans"][0]["replicas_added"] > 0
    assert rows["live"]["replica_ms"] > 0 == rows["scalemoe"]["replica_ms"]
    assert {"command", "cpu", "threads_per_rank"} <= set(result["env"])
