"""The examples' scripts and the quickstart: help and mistakes, and one short run of them all. The venv is a stand-in, without pip.

The quickstart starts its ranks with torchrun, the others have them forked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scalemoe.traffic.trace import load_trace

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("run_baseline", "run_adaptive", "run_kmeans", "run_ga", "run_all", "prepare_checkpoint")
EXAMPLES = {"gpt_moe": "pretrain_gpt.py", "bert_moe": "pretrain_bert.py"}
SIZES = {"--num-layers": 1, "--hidden-size": 16, "--ffn-hidden-size": 16, "--seq-length": 16, "--log-interval": 2, "--eval-iters": 1}
TINY = [str(word) for pair in SIZES.items() for word in pair]
# FORKED_RANKS: what starts ranks in torchrun's place, and get_data.sh's script, which imports Megatron, too.
FAKE_PYTHON = """#!/bin/bash
[[ "$1 $2" != "-m pip" ]] || exit 0
[[ -z "$FORKED_RANKS" || "${{*:1:4}}" != "-m torch.distributed.run --standalone --nproc_per_node" ]] || exec $FORKED_RANKS "$5" "${{@:7}}"
[[ -z "$FORKED_RANKS" || "$1" != -W ]] || exec $FORKED_RANKS 1 "${{@:3}}"
exec {python} "$@"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The scripts, and what they look at, with a .venv whose Python is this one."""
    for folder in ("tools", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("megatron_scalemoe", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def run(checkout: Path, script: str, *arguments: str, example: str = "gpt_moe", **settings: str) -> subprocess.CompletedProcess:
    names = ("RANKS", "ITERS", "LOGS", "DATA", "REPLICAS", "TOPOLOGY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | settings
    command = ["bash", f"examples/{example}/{script}.sh", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=570)


def test_help_needs_no_venv(checkout):
    shutil.rmtree(checkout / ".venv")
    for example, program in EXAMPLES.items():
        assert {path.stem for path in (checkout / "examples" / example).glob("*.sh")} == {*SCRIPTS, "get_data"}
        for script in SCRIPTS:
            result = run(checkout, script, "--help", example=example)
            assert result.returncode == 0, result.stderr
            assert f"bash examples/{example}/{script}.sh [flags of {program} ...]" in result.stdout
            assert "RANKS=N" in result.stdout and "set -euo" not in result.stdout
    for argument, code in (("--help", 0), ("--no-such-flag", 2)):
        result = run(checkout, "get_data", argument, example="bert_moe")
        assert result.returncode == code
        assert "[DATA=data/text] bash examples/bert_moe/get_data.sh [FILE OR FOLDER ...]" in result.stdout
    assert not (checkout / ".venv").exists() and not (checkout / "data").exists()


def test_mistakes_are_told_before_anything_starts(checkout):
    mistakes = [
        ("run_baseline", [], {"RANKS": "3"}, "RANKS must be 2, 4, 8 or 16"),
        ("run_baseline", [], {"ITERS": "many"}, "ITERS must be a number of iterations"),
        ("run_baseline", [], {"DATA": "no/such"}, "DATA names no PREFIX.bin and PREFIX.idx"),
        ("run_kmeans", [], {"REPLICAS": "3", "RANKS": "2"}, "REPLICAS must be a multiple of the ranks"),
        ("run_ga", [], {"TOPOLOGY": "no/such.yaml"}, "TOPOLOGY names no file"),
        ("run_adaptive", ["--run-name", "mine"], {}, "--run-name is the stage's own"),
        ("run_adaptive", ["--train-iters", "7"], {}, "--train-iters: the iterations are ITERS"),
        ("run_ga", ["--load", "x"], {}, "a stage starts from prepare_checkpoint.sh's checkpoint"),
        ("run_all", ["--scalemoe-migrate"], {}, "--scalemoe-migrate would make the stages something else"),
    ]
    for script, arguments, settings, said in mistakes:
        result = run(checkout, script, *arguments, **settings)
        assert result.returncode == 1
        assert f"error: {said}" in result.stderr
    assert not (checkout / "logs").exists()


def test_a_wrong_flag_is_told_once_and_the_last_results_stay(checkout):
    results = checkout / "logs" / "gpt_moe" / "adaptive" / "config.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    result = run(checkout, "run_adaptive", "--no-such-flag")
    assert result.returncode == 2
    assert result.stderr.count("unrecognized arguments: --no-such-flag") == 1
    assert results.exists()


def test_a_folder_of_something_else_is_not_replaced(checkout):
    theirs = checkout / "logs" / "gpt_moe" / "prepared" / "stock" / "thesis.tex"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("x")
    result = run(checkout, "run_adaptive")
    assert result.returncode == 1
    assert "is no folder of a stage" in result.stderr
    assert theirs.exists()


def test_the_quickstart(checkout):
    command = ["bash", "tools/quickstart.sh", *TINY, "--train-iters", "4", "--compare-iters", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "Trained 4 iterations on 2 ranks with --moe-dispatcher scalemoe" in result.stdout
    table = result.stdout[result.stdout.index("max difference") :]
    assert all(dispatcher in table for dispatcher in ("stock alltoall", "stock allgather", "padded", "scalemoe"))
    [folder] = (checkout / "runs").iterdir()
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "4"
    wrong = subprocess.run(["bash", "tools/quickstart.sh", "--no-such-flag"], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr.count("unrecognized arguments: --no-such-flag") == 1


def losses_of(folder: Path) -> dict[int, float]:
    history = json.loads((folder / "train.json").read_text())["history"]
    return {record["iteration"]: record["lm_loss"] for record in history if "lm_loss" in record}


def test_all_stages_train_the_same_and_are_reported(checkout, ranks_command):
    settings = {"RANKS": "2", "ITERS": "8", "LOGS": "out/logs", "FORKED_RANKS": " ".join(ranks_command)}
    result = run(checkout, "run_all", *TINY, example="bert_moe", **settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("preparing: 2 iterations of stock Megatron on 2 ranks") == 1
    logs = checkout / "out" / "logs"
    assert list(losses_of(logs / "prepared" / "stock")) == [2]
    losses = {stage: losses_of(logs / stage) for stage in ("baseline", "adaptive", "kmeans", "ga", "stock", "stock_rounding")}
    for stage in losses:
        assert "iteration        8/       8" in (logs / stage / "train.log").read_text()
        assert list(losses[stage]) == [4, 6, 8]
        assert losses[stage] == pytest.approx(losses["baseline"], rel=1e-5)
        assert (logs / stage / "routing.npz").exists() == (not stage.startswith("stock"))
    assert losses["baseline"][8] < losses["baseline"][4]
    assert load_trace(logs / "ga" / "routing.npz").num_experts == 16
    assert [row["policy"] for row in json.loads((logs / "ga" / "compare.json").read_text())["rows"]][:2] == ["contiguous", "random"]
    assert (logs / "report.html").read_text().startswith("<!DOCTYPE html>")
    table = result.stdout[result.stdout.index("loss difference") :]
    assert "warning" not in table
    for what in ("stock alltoall", "padded", "ragged", "ragged + 8 replicas + sequences", "ragged + 8 replicas + sequences + migration"):
        assert what in table


def test_the_checkpoint_is_stocks_on_the_data_that_is_there(checkout, ranks_command):
    (checkout / "poem.txt").write_text("Tyger Tyger, burning bright, in the forests of the night. " * 40)
    forked = {"FORKED_RANKS": " ".join(ranks_command)}
    assert run(checkout, "get_data", "poem.txt", **forked).returncode == 0
    assert "is there already" in run(checkout, "get_data", "poem.txt", **forked).stderr
    ours = ["--moe-dispatcher=scalemoe", "--scalemoe-replicas", "2"]  # of a stage: not for the checkpoint
    result = run(checkout, "prepare_checkpoint", *ours, *TINY, RANKS="2", ITERS="4", **forked)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "preparing: 1 iterations of stock Megatron on 2 ranks, to logs/gpt_moe/prepared, on data/text" in result.stderr
    folder = checkout / "logs" / "gpt_moe" / "prepared" / "stock"
    options = json.loads((folder / "config.json").read_text())["args"]
    assert options["data_path"] == ["data/text"]
    assert options["moe_dispatcher"] == "stock"
    assert options["lr_decay_iters"] == 4
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "1"
