"""The GPT-MoE example as a user runs it: torchrun, real text, real checkpoints."""

import json
import os
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


def launch(folder: Path, *flags: str, ranks: int = 2, ep: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--", str(SCRIPT)]
    return subprocess.Popen(
        [*command, *TINY, "--expert-model-parallel-size", str(ep), *flags],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *flags: str, ranks: int = 2, ep: int = 2) -> tuple[int, str]:
    """Exit code and output."""
    process = launch(folder, *flags, ranks=ranks, ep=ep)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def train(folder: Path, name: str, *flags: str, **sizes: int) -> dict[int, float]:
    """Train successfully; returns {iteration: loss}."""
    code, output = run(folder, "--run-name", name, *flags, **sizes)
    assert code == 0, output[-4000:]
    history = json.loads((folder / "runs" / name / "train.json").read_text())["history"]
    return {record["iteration"]: record["lm_loss"] for record in history if "lm_loss" in record}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Stock and scalemoe runs of 100 iterations, with checkpoints at 50 and 100, in one folder."""
    folder = tmp_path_factory.mktemp("example")
    flags = ("--train-iters", "100", "--save-interval", "50")
    stock = train(folder, "stock", *flags)
    ours = train(folder, "ours", *flags, "--moe-dispatcher", "scalemoe", "--compare-iters", "2")
    return folder, stock, ours


def test_the_loss_curve_is_stock_megatrons(runs):
    _, stock, ours = runs
    assert list(stock) == list(range(1, 101))
    assert stock[100] < 0.7 * stock[1], "the model does not learn"
    assert max(abs(stock[i] - ours[i]) for i in stock) <= 1e-4


def test_the_auxiliary_loss_is_stock_megatrons(runs):
    folder, _, _ = runs
    stock, ours = (json.loads((folder / "runs" / name / "train.json").read_text())["history"] for name in ("stock", "ours"))
    pairs = [(a["load_balancing_loss"], b["load_balancing_loss"]) for a, b in zip(stock, ours, strict=True) if "lm_loss" in a]
    assert len(pairs) == 100
    assert all(a > 0.9 and abs(a - b) <= 1e-4 for a, b in pairs)  # 1 is a perfect balance


def test_the_comparison_table(runs):
    folder, _, _ = runs
    rows = json.loads((folder / "runs" / "ours" / "compare.json").read_text())["rows"]
    by_name = {row["dispatcher"]: row for row in rows}
    assert list(by_name) == ["stock alltoall", "stock allgather", "padded", "scalemoe"]
    assert all(row["max_loss_difference"] <= 1e-4 and row["max_rel_error"] <= 1e-5 for row in rows)
    assert by_name["scalemoe"]["bytes_out"] < by_name["stock alltoall"]["bytes_out"] < by_name["padded"]["bytes_out"]
    assert all(row["tokens_per_s"] > 0 and row["dispatch_combine_ms"] > 0 for row in rows)
    assert list((folder / "runs" / "ours" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("ranks", "ep", "flags"), [(2, 2, ("--moe-dispatcher", "scalemoe")), (2, 2, ()), (4, 4, ("--moe-dispatcher", "scalemoe"))]
)
def test_resume_continues_the_same_curve(runs, ranks, ep, flags):
    """From the ScaleMoE run's checkpoint of iteration 50: ours again, stock, and on 4 ranks."""
    folder, _, ours = runs
    load = ("--load", "runs/ours/checkpoints", "--ckpt-step", "50", "--train-iters", "60", "--lr-decay-iters", "100")
    # the auxiliary loss is of one rank's own tokens, so it depends on the number of ranks
    tolerance = 1e-6 if ranks == 2 else 0.05
    resumed = train(folder, f"resumed-{ranks}-{len(flags)}", *load, *flags, ranks=ranks, ep=ep)
    assert list(resumed) == list(range(51, 61))
    assert max(abs(resumed[i] - ours[i]) for i in resumed) <= tolerance


def test_parallel_layouts_train(tmp_path):
    """TP x EP, PP, the distributed optimizer, bf16 and recomputation, all at once over two runs."""
    layout = ("--tensor-model-parallel-size", "2", "--use-distributed-optimizer", "--overlap-grad-reduce", "--bf16")
    tp = train(tmp_path, "tp", "--train-iters", "15", *layout, "--moe-dispatcher", "scalemoe", ranks=4, ep=2)
    pipeline = ("--pipeline-model-parallel-size", "2", "--recompute-granularity", "full", "--recompute-method", "uniform")
    pp = train(
        tmp_path, "pp", "--train-iters", "15", *pipeline, "--recompute-num-layers", "1", "--moe-dispatcher", "scalemoe", ranks=4, ep=2
    )
    for losses in (tp, pp):
        assert losses[15] < 0.9 * losses[1]


BAD = {
    "unknown flag": (["--no-such-flag"], "--no-such-flag"),
    "contradiction": (["--scalemoe-dispatch", "padded"], "needs --moe-dispatcher scalemoe"),
    "experts not divisible": (["--num-experts", "7"], "--num-experts must be a multiple"),
    "unsupported": (
        ["--moe-dispatcher", "scalemoe", "--moe-shared-expert-overlap", "--moe-shared-expert-intermediate-size", "32"],
        "--moe-shared-expert-overlap",
    ),
    "missing data": (["--data-path", "/nowhere/at/all"], "--data-path names nothing"),
    "missing checkpoint": (["--load", "/nowhere/at/all"], "no checkpoint in /nowhere/at/all"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_clear_error(tmp_path, name):
    flags, message = BAD[name]
    code, output = run(tmp_path, "--train-iters", "2", *flags)
    assert code != 0
    assert message in output
    assert (
        "Traceback"
        not in output.split("torch.distributed.elastic")[0].split('Traceback (most recent call last):\n  File "<frozen runpy>')[0]
    )


def test_ranks_with_different_flags_are_refused(tmp_path):
    """Two ranks started by hand, one with another learning rate."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *TINY, "--expert-model-parallel-size", "2", "--train-iters", "2", "--lr", lr],
            cwd=tmp_path,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, lr in enumerate(("1e-3", "2e-3"))
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert "--lr" in output


def test_a_killed_rank_ends_the_job(tmp_path):
    """SIGKILL one rank in the middle of training: the job ends with an error, and no process is left."""
    psutil = pytest.importorskip("psutil", reason="psutil lists the job's processes")
    process = launch(tmp_path, "--run-name", "killed", "--train-iters", "100000", "--moe-dispatcher", "scalemoe")
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
