"""Runs the real training scripts of the Megatron-LM checkout that MEGATRON_LM_PATH names, on CPU ranks, and reads their logs."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan

CHECKOUT = os.environ.get("MEGATRON_LM_PATH", "")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="MEGATRON_LM_PATH does not name a checkout of Megatron-LM: git clone -b core_v0.16.1, then set it"
)
ITERATIONS = 50
TOLERANCE = 1e-4
SECONDS = 420  # of one run, on a machine that others use, too
OURS = ("--moe-dispatcher", "scalemoe")
MODEL = shlex.split("""
--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --position-embedding-type rope
--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
--seq-length 64 --max-position-embeddings 64 --micro-batch-size 2 --global-batch-size 8
--transformer-impl local --disable-bias-linear --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-bias-dropout-fusion --no-bias-gelu-fusion --no-rope-fusion
--lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 5 --lr-decay-iters 50 --train-iters 50
--moe-token-dispatcher-type alltoall --distributed-backend gloo --log-interval 1 --eval-iters 1 --eval-interval 1000 --num-workers 0
""")
MOCK_DATA = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "511")
_LINE = re.compile(r" iteration +(\d+)/.* lm loss: (\S+) \|")
# what changes from run to run: clocks, durations, addresses; the version has the commit where there is a .git
_CHANGING = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+|^W\d{4} [\d:.]+ \d+|"
    r"(?<=\(ms\): )[\d.]+|(?<=\(seconds\): )[\d.]+|(?<=ation time: )[\d.]+|(?<=Core version \.{10} )\S+|: \([\d., ]+\)$|0x\w+",
    re.MULTILINE,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a script: what each rank printed, what torchrun did, and the loss of each iteration."""

    ranks: tuple[str, ...]
    launcher: str
    losses: dict[int, float]

    @property
    def log(self) -> str:
        return "\n".join([*self.ranks, self.launcher])

    @property
    def steady(self) -> list[list[str]]:
        """The lines of each rank without what changes from run to run. Sorted: Megatron prints parameters in the order of a set."""
        return [sorted(_CHANGING.sub("", log).splitlines()) for log in self.ranks]


def run(
    ranks: int,
    *flags: object,
    script: str = "pretrain_gpt.py",
    data: tuple = MOCK_DATA,
    program: tuple = ("-m", "megatron_scalemoe.launch"),
    checkout: str = CHECKOUT,
    modules: str = "",
    fails: bool = False,
) -> Run:
    """Train with these flags besides MODEL's. program: the launcher, or what else runs the script. modules: a folder of more of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command += ["--redirects", "3", "--log-dir", folder, *program, f"{checkout}/{script}", *MODEL, *data, *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [modules, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
        logs = tuple(_log_of(Path(folder), rank) for rank in range(ranks))
    assert (done.returncode != 0) == fails, "\n".join(log[-4000:] for log in (*logs, done.stderr))
    found = [_LINE.search(line) for line in logs[-1].splitlines()]
    return Run(logs, done.stdout + done.stderr, _single_losses({int(line[1]): float(line[2]) for line in found if line}))


def _log_of(folder: Path, rank: int) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(f"*/attempt_0/{rank}/*.log")))


def _single_losses(logged: dict[int, float]) -> dict[int, float]:
    """Megatron's second log line is the mean of the first two iterations."""
    first, second, *_ = [*logged, None, None]
    return logged if second is None else logged | {second: 2 * logged[second] - logged[first]}


@functools.cache
def stock(ranks: int, *flags: object, **options) -> Run:
    """`run` without our flag; once for each set of flags."""
    return run(ranks, *flags, **options)


def differences(one: Run, other: Run, first: int = 1) -> list[float]:
    """Of the losses of every iteration from `first`; both runs must have them all."""
    return [abs(one.losses[step] - other.losses[step]) for step in range(first, ITERATIONS + 1)]


def make_text_data(folder: Path) -> tuple[str, ...]:
    """Flags for a data set of real text, the standard library's sources, made by Megatron's own tool with a SentencePiece tokenizer."""
    import sentencepiece

    folder.mkdir()
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:40]
    lines = [json.dumps({"text": source.read_text(encoding="utf-8", errors="replace")}) for source in sources]
    (folder / "text.jsonl").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=[str(source) for source in sources], model_prefix=str(folder / "tokenizer"), vocab_size=500, minloglevel=2
    )
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tokenizer.model")]
    command = [sys.executable, "-m", "megatron_scalemoe.launch", f"{CHECKOUT}/tools/preprocess_data.py", *tokenizer]
    command += ["--input", str(folder / "text.jsonl"), "--output-prefix", str(folder / "text"), "--append-eod", "--workers", "1"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (folder / "text_text_document.bin").stat().st_size > 500_000
    data = ["--data-path", str(folder / "text_text_document"), "--split", "90,5,5", "--data-cache-path", str(folder / "cache")]
    return (*tokenizer, *data)


def save_some_plan(folder: Path, ranks: int = 2) -> Path:
    """A plan for the test model on so many expert-parallel ranks, in which experts have moved and some of them have replicas."""
    homes_GL = np.array([7, 2, 5, 0, 1, 3, 4, 6]).reshape(ranks, -1)
    slots = np.concatenate([homes_GL, np.roll(homes_GL[:, :1], -1, axis=0)], axis=1).reshape(-1)
    path = folder / f"plan_for_{ranks}.json"
    save_plan(PlacementPlan(np.stack([slots, slots]), ranks, 8), path, force=True)
    return path
