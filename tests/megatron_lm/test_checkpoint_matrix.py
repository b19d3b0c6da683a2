"""Every kind of run goes on from every other kind's checkpoint with the losses of the run that was not interrupted, or is refused by name.

Kinds of runs x kinds of runs x formats of the optimizer's state x expert-parallel sizes, on the real pretrain_gpt.py.
"""

import functools
from pathlib import Path

import pytest

from tests.megatron_lm.script import OURS, Run, needs_checkout, run, save_some_plan, stock

pytestmark = needs_checkout

LAST = 9
# Auxiliary loss and dropout depend on which sequences meet on a rank.
EXACT = ("--moe-aux-loss-coeff", 0, "--hidden-dropout", 0, "--attention-dropout", 0, "--train-iters", LAST)
TOLERANCE = 1.5e-6  # Megatron logs six decimals: rounding alone can make two losses differ by 1e-6
KINDS = ("stock", "ours", "grouped", "plan", "migrated")
GROUPED = ("grouped", "plan", "migrated")
FORMATS = {
    "plain": (),
    "dp_reshardable": ("--use-distributed-optimizer",),
    "fully_reshardable": ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"),
}


def flags_of(kind: str, ranks: int, folder: Path) -> tuple:
    """migrated: goes on with the checkpoint's plan, and so moves experts while it runs."""
    ours = {
        "ours": (),
        "grouped": ("--scalemoe-experts", "grouped"),
        "plan": ("--scalemoe-plan", save_some_plan(folder, ranks)),
        "migrated": ("--scalemoe-migrate", "--scalemoe-replicas", ranks, "--scalemoe-replan-interval", 0),
    }
    return () if kind == "stock" else (*OURS, *ours[kind])


def train(kind: str, ranks: int, folder: Path, *flags: object, **options) -> Run:
    sizes = ("--expert-model-parallel-size", ranks)
    return run(ranks, *sizes, *EXACT, *flags_of(kind, ranks, folder), *flags, **options)


def saving(folder: Path, last: int) -> tuple:
    return "--save", folder, "--save-interval", 1000, "--exit-interval", last


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(kind, flags)`: a checkpoint after 8 iterations on two ranks, made once."""

    @functools.cache
    def make(kind: str, flags: tuple) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        start = ()
        if kind == "migrated":
            train("plan", 2, folder, *flags, *saving(folder / "start", 4))
            start = ("--load", folder / "start")
        done = train(kind, 2, folder, *flags, *start, *saving(folder / "checkpoints", 8))
        assert kind != "migrated" or "plan not resumed" not in done.log
        return folder / "checkpoints"

    return make


def check(kind: str, ranks: int, folder: Path, checkpoint: Path, flags: tuple, refusal: str) -> None:
    """Goes on from the checkpoint, by itself or refused with this text."""
    flags = (*flags, "--load", checkpoint)
    if refusal:
        log = train(kind, ranks, folder, *flags, fails=True).log
        assert kind == "stock" or refusal in log
        assert f"iteration        {LAST}/" not in log
        return
    whole = stock(2, "--expert-model-parallel-size", 2, *EXACT)
    gone_on = train(kind, ranks, folder, *flags)
    assert list(gone_on.losses) == [LAST]
    assert gone_on.losses[LAST] == pytest.approx(whole.losses[LAST], abs=TOLERANCE)


@pytest.mark.parametrize("reader", KINDS)
@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("optimizer", FORMATS)
def test_same_expert_parallel_size(optimizer, writer, reader, saved, tmp_path):
    flags = FORMATS[optimizer]
    flat_buffers = optimizer == "dp_reshardable" and writer not in GROUPED
    refusal = "--ckpt-convert-save" if flat_buffers and reader in GROUPED else ""
    check(reader, 2, tmp_path, saved(writer, flags), flags, refusal)


@pytest.mark.parametrize("reader", KINDS)
@pytest.mark.parametrize("writer", KINDS)
@pytest.mark.parametrize("optimizer", FORMATS)
def test_four_ranks_instead_of_two(optimizer, writer, reader, saved, tmp_path):
    flags = FORMATS[optimizer]
    flat_buffers = optimizer == "dp_reshardable" and writer not in GROUPED
    refusal = "--dist-ckpt-optim-fully-reshardable" if flat_buffers else ""
    check(reader, 4, tmp_path, saved(writer, flags), (*flags, "--no-load-rng"), refusal)


@pytest.mark.parametrize("reader", ["ours", "plan"])
def test_no_expert_parallelism_any_more(reader, saved, tmp_path):
    """Megatron itself cannot load the optimizer's state there."""
    kind = "ours" if reader == "ours" else "grouped"
    flags = ("--load", saved(reader, ()), "--expert-model-parallel-size", 1)
    log = train(kind, 2, tmp_path, *flags, fails=True).log
    assert "--no-load-optim --no-load-rng" in log
    log = train(kind, 2, tmp_path, *flags, "--no-load-optim", "--no-load-rng").log
    assert "49 tensors of" in log  # the weights


def test_a_converted_checkpoint_can_be_read(saved, tmp_path):
    """What the refusal of flat buffers tells to do."""
    flags = FORMATS["dp_reshardable"]
    convert = ("--load", saved("stock", flags), "--ckpt-convert-format", "torch_dist", "--ckpt-convert-save", tmp_path / "converted")
    train("stock", 2, tmp_path, *flags, "--dist-ckpt-optim-fully-reshardable", *convert)
    check("plan", 2, tmp_path, tmp_path / "converted/torch_dist", flags, "")


@pytest.mark.parametrize("kind", ["ours", "plan"])
def test_in_bf16_it_is_as_near_as_stocks_own_resume(kind, tmp_path):
    """The second iteration shows whether the main parameters are right: the first one computes with the weights."""
    flags = ("--bf16", *FORMATS["dp_reshardable"], "--train-iters", 12)
    whole = train(kind, 2, tmp_path, *flags)
    train(kind, 2, tmp_path, *flags, *saving(tmp_path / "checkpoints", 8))
    gone_on = train(kind, 2, tmp_path, *flags, "--load", tmp_path / "checkpoints")
    assert gone_on.losses == pytest.approx({step: whole.losses[step] for step in range(9, 13)}, abs=TOLERANCE)
