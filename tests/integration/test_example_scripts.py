"""The stages' scripts of examples/gpt_moe: help and mistakes, and one short run of them all. The venv is a stand-in, without pip."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scalemoe.traffic.trace import load_trace

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("baseline", "adaptive", "kmeans", "ga", "all")
TINY = [
    "--num-layers",
    "1",
    "--hidden-size",
    "16",
    "--ffn-hidden-size",
    "16",
    "--seq-length",
    "16",
    "--log-interval",
    "2",
    "--eval-iters",
    "1",
]
FAKE_PYTHON = """#!/bin/bash
[[ "$1 $2" != "-m pip" ]] || exit 0
exec {python} "$@"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The scripts, and what they look at, with a .venv whose Python is this one."""
    for folder in ("tools", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "megatron_scalemoe").symlink_to(ROOT / "megatron_scalemoe")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def run(checkout: Path, stage: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    names = ("RANKS", "ITERS", "LOGS", "REPLICAS", "TOPOLOGY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | settings
    command = ["bash", f"examples/gpt_moe/run_{stage}.sh", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("stage", STAGES)
def test_help_needs_no_venv(checkout, stage):
    shutil.rmtree(checkout / ".venv")
    result = run(checkout, stage, "--help")
    assert result.returncode == 0, result.stderr
    assert f"bash examples/gpt_moe/run_{stage}.sh [flags of pretrain_gpt.py ...]" in result.stdout
    assert "RANKS=N" in result.stdout
    assert "set -euo" not in result.stdout
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("stage", "arguments", "settings", "said"),
    [
        ("baseline", [], {"RANKS": "3"}, "RANKS must be 2, 4, 8 or 16"),
        ("baseline", [], {"ITERS": "many"}, "ITERS must be a number of iterations"),
        ("kmeans", [], {"REPLICAS": "3", "RANKS": "2"}, "REPLICAS must be a multiple of the ranks"),
        ("ga", [], {"TOPOLOGY": "no/such.yaml"}, "TOPOLOGY names no file"),
        ("adaptive", ["--run-name", "mine"], {}, "--run-name is the stage's own"),
        ("adaptive", ["--results-dir=x"], {}, "--results-dir=x is the stage's own"),
        ("ga", ["--load", "x"], {}, "a stage starts afresh"),
        ("all", ["--scalemoe-migrate"], {}, "--scalemoe-migrate would make the stages something else"),
    ],
)
def test_mistakes_are_told_before_anything_starts(checkout, stage, arguments, settings, said):
    result = run(checkout, stage, *arguments, **settings)
    assert result.returncode == 1
    assert f"error: {said}" in result.stderr
    assert not (checkout / "logs").exists()


def test_a_wrong_flag_is_told_once_and_the_last_results_stay(checkout):
    results = checkout / "logs" / "gpt_moe" / "adaptive" / "config.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    result = run(checkout, "adaptive", "--no-such-flag")
    assert result.returncode == 2
    assert result.stderr.count("unrecognized arguments: --no-such-flag") == 1
    assert results.exists()


def test_a_folder_of_something_else_is_not_replaced(checkout):
    theirs = checkout / "logs" / "gpt_moe" / "adaptive" / "thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("x")
    result = run(checkout, "adaptive")
    assert result.returncode == 1
    assert "is no folder of a stage" in result.stderr
    assert theirs.exists()


def test_all_stages_train_the_same_and_are_reported(checkout):
    result = run(checkout, "all", *TINY, RANKS="2", ITERS="8", LOGS="out/logs")
    assert result.returncode == 0, result.stderr[-3000:]
    logs = checkout / "out" / "logs"
    losses = {}
    for stage in ("baseline", "adaptive", "kmeans", "ga", "stock", "stock_rounding"):
        history = json.loads((logs / stage / "train.json").read_text())["history"]
        losses[stage] = [record["lm_loss"] for record in history if "lm_loss" in record]
        assert len(losses[stage]) == 4
        assert "iteration        8/       8" in (logs / stage / "train.log").read_text()
        assert losses[stage] == pytest.approx(losses["baseline"], rel=1e-5)
        assert (logs / stage / "routing.npz").exists() == (not stage.startswith("stock"))
    assert losses["baseline"][-1] < losses["baseline"][0]
    assert load_trace(logs / "ga" / "routing.npz").num_experts == 16
    assert [row["policy"] for row in json.loads((logs / "ga" / "compare.json").read_text())["rows"]][:2] == ["contiguous", "random"]
    assert (logs / "report.html").read_text().startswith("<!DOCTYPE html>")
    table = result.stdout[result.stdout.index("loss difference") :]
    assert "warning" not in table
    for what in ("stock alltoall", "padded", "ragged", "ragged + 8 replicas + sequences", "ragged + 8 replicas + sequences + migration"):
        assert what in table
