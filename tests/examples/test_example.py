"""The GPT-MoE example as a user runs it: real text, real checkpoints.

Torchrun starts the ranks of which one is killed; the others are forked.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "gpt_moe" / "pretrain_gpt.py"
TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "64", "--num-attention-heads", "4", "--seq-length", "32"),
    *("--num-experts", "8", "--moe-aux-loss-coeff", "0.01", "--micro-batch-size", "2", "--global-batch-size", "8"),
    *("--lr-warmup-iters", "2", "--log-interval", "1", "--eval-iters", "1"),
]
TIMEOUT_S = 240
SAVED, LAST = 30, 60


def start(command: list[str], folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, str(SCRIPT), *TINY, "--expert-model-parallel-size", "2", *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def run(ranks_command):
    """Runs the script in a folder, with flags; exit code and output."""

    def on_ranks(folder: Path, *flags: str, ranks: int = 2) -> tuple[int, str]:
        process = start([*ranks_command, str(ranks)], folder, *flags)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output

    return on_ranks


@pytest.fixture(scope="module")
def train(run):
    """Trains successfully; {iteration: loss}."""

    def trained(folder: Path, name: str, *flags: str, ranks: int = 2) -> dict[int, float]:
        code, output = run(folder, "--run-name", name, *flags, ranks=ranks)
        assert code == 0, output[-4000:]
        return {record["iteration"]: record["lm_loss"] for record in history(folder, name)}

    return trained


def history(folder: Path, name: str) -> list[dict]:
    """Of the iterations that trained."""
    records = json.loads((folder / "runs" / name / "train.json").read_text())["history"]
    return [record for record in records if "lm_loss" in record]


@pytest.fixture(scope="module")
def runs(train, tmp_path_factory):
    """Stock and scalemoe runs of `LAST` iterations, in one folder; of ours a checkpoint at `SAVED`, too."""
    folder = tmp_path_factory.mktemp("example")
    flags = ("--train-iters", str(LAST))
    stock = train(folder, "stock", *flags)
    ours = train(folder, "ours", *flags, "--save-interval", str(SAVED), "--moe-dispatcher", "scalemoe", "--compare-iters", "2")
    return folder, stock, ours


def test_the_losses_are_stock_megatrons(runs):
    folder, stock, ours = runs
    assert list(stock) == list(range(1, LAST + 1))
    assert stock[LAST] < 0.8 * stock[1], "the model does not learn"
    assert max(abs(stock[i] - ours[i]) for i in stock) <= 1e-4
    balance = [
        (a["load_balancing_loss"], b["load_balancing_loss"]) for a, b in zip(history(folder, "stock"), history(folder, "ours"), strict=True)
    ]
    assert all(a > 0.9 and abs(a - b) <= 1e-4 for a, b in balance)  # 1 is a perfect balance


def test_the_comparison_table(runs):
    folder, _, _ = runs
    rows = json.loads((folder / "runs" / "ours" / "compare.json").read_text())["rows"]
    by_name = {row["dispatcher"]: row for row in rows}
    assert list(by_name) == ["stock alltoall", "stock allgather", "padded", "scalemoe"]
    assert all(row["max_loss_difference"] <= 1e-4 and row["max_rel_error"] <= 1e-5 for row in rows)
    assert by_name["scalemoe"]["bytes_out"] < by_name["stock alltoall"]["bytes_out"] < by_name["padded"]["bytes_out"]
    assert all(row["tokens_per_s"] > 0 and row["dispatch_combine_ms"] > 0 for row in rows)
    assert list((folder / "runs" / "ours" / "tensorboard").glob("events*"))


def test_stock_resumes_our_checkpoint_on_the_same_curve(train, runs):
    folder, _, ours = runs
    load = ("--load", "runs/ours/checkpoints", "--ckpt-step", str(SAVED), "--train-iters", str(SAVED + 10), "--lr-decay-iters", str(LAST))
    resumed = train(folder, "resumed", *load)
    assert list(resumed) == list(range(SAVED + 1, SAVED + 11))
    assert max(abs(resumed[i] - ours[i]) for i in resumed) <= 1e-6


def test_a_parallel_layout_trains(train, tmp_path):
    """TP, PP and EP, the distributed optimizer, bf16 and recomputation, all at once."""
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-tensor-parallel-size 1 --use-distributed-optimizer "
    layout += "--overlap-grad-reduce --bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    losses = train(tmp_path, "all", "--train-iters", "15", *layout.split(), "--moe-dispatcher", "scalemoe", ranks=4)
    assert losses[15] < 0.9 * losses[1]


def test_wrong_flags_are_refused_before_any_rank_starts(tmp_path):
    wrong = {
        "--no-such-flag": "--no-such-flag",
        "--scalemoe-dispatch padded": "needs --moe-dispatcher scalemoe",
        "--num-experts 7": "--num-experts must be a multiple",
    }
    for flags, message in wrong.items():
        command = [sys.executable, str(ROOT / "examples/common/arguments.py"), *TINY, "--expert-model-parallel-size", "2", *flags.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert message in done.stderr and "Traceback" not in done.stderr


def test_what_only_the_ranks_find_is_a_clear_error_too(run, tmp_path):
    code, output = run(tmp_path, "--train-iters", "2", "--load", "/nowhere/at/all")
    assert code != 0
    assert "no checkpoint in /nowhere/at/all" in output
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(run, tmp_path):
    flags = ("--lr", "1e30", "--min-lr", "1e30", "--train-iters", "8", "--save-interval", "1", "--run-name", "nan")
    code, output = run(tmp_path, *flags)
    assert code != 0 and "loss and gradients must be finite" in output
    failed = int(re.search(r"in iteration (\d+)", output)[1])
    latest = tmp_path / "runs" / "nan" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert int(latest.read_text()) == failed - 1


def test_ranks_with_different_flags_are_refused(run, tmp_path):
    code, output = run(tmp_path, "--train-iters", "2", "--lr", "1e-{rank}")
    assert code == 1
    assert output.count("--lr: 1.0 on rank 0; 0.1 on rank 1") == 2


def test_a_killed_rank_ends_the_job(tmp_path):
    """SIGKILL one rank in the middle of training: the job ends with an error, and no process is left."""
    psutil = pytest.importorskip("psutil", reason="psutil lists the job's processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    process = start(torchrun, tmp_path, "--run-name", "killed", "--train-iters", "100000", "--moe-dispatcher", "scalemoe")
    deadline = time.monotonic() + TIMEOUT_S
    ranks = []
    try:
        for line in process.stdout:
            if " iteration        5/" in line:
                ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "pretrain_gpt.py" in " ".join(p.cmdline())]
                ranks[-1].kill()
                break
            assert time.monotonic() < deadline
        rest = process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(ranks) == 2
    assert process.returncode != 0
    assert "rank" in rest
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
