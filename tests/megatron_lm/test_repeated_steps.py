"""Steps that Megatron repeats, skips or drops: with replicas and live balance as in stock, exit code and checkpoint included."""

import re

import numpy as np
import pytest

from megatron_scalemoe.traffic.trace import load_trace
from tests.megatron_lm.script import OURS, Run, needs_checkout, run, save_some_plan, stock

pytestmark = needs_checkout

LAST = 10
# Auxiliary loss and dropout depend on which sequences meet on a rank.
FLAGS = (
    "--expert-model-parallel-size",
    2,
    "--train-iters",
    LAST,
    "--moe-aux-loss-coeff",
    0,
    "--hidden-dropout",
    0,
    "--attention-dropout",
    0,
)
LIVE = ("--scalemoe-replan-interval", 2, "--scalemoe-trace-interval", 1, "--scalemoe-sequence-placement", "history")
INJECTED = ("--rerun-mode", "validate_results", "--error-injection-rate", 3, "--error-injection-type")
NAN = ("--lr", "1e30", "--min-lr", "1e30")
ENDED = {
    "transient": (*INJECTED, "transient_error"),
    "persistent": (*INJECTED, "persistent_error"),
    "correct": (*INJECTED, "correct_result"),
    "nan": (*NAN, "--rerun-mode", "validate_results"),
    "nan, not repeated": (*NAN, "--rerun-mode", "disabled"),
}
GOES_ON = {
    # of all checks only that for spiky loss lets the run go on
    "repeated": (*INJECTED, "transient_error", "--no-check-for-nan-in-loss-and-grad", "--check-for-spiky-loss"),
    "skipped": ("--iterations-to-skip", 3, 4, 8),
    "evaluation": ("--eval-interval", 2, "--eval-iters", 2),
    "overflow": ("--fp16", "--initial-loss-scale", 2**22, "--hysteresis", 1, "--scalemoe-experts", "megatron"),
}


def ours(folder, *more: object) -> tuple:
    return (*OURS, "--scalemoe-plan", save_some_plan(folder), *more)


def exit_codes(done: Run) -> set[str]:
    """Of the ranks, without those that torchrun has killed."""
    return set(re.findall(r"exitcode +: (\d+)", done.launcher))


@pytest.mark.parametrize("live", [(), LIVE], ids=["plan", "live"])
@pytest.mark.parametrize("case", ENDED)
def test_ends_as_stock_does(case, live, tmp_path):
    """With the same exit code, and a checkpoint of the same state: stock goes on from both, with the same losses."""
    results = []
    for name, flags in (("stock", ()), ("ours", ours(tmp_path, *live))):
        folder = tmp_path / name
        done = run(2, *FLAGS, *ENDED[case], *flags, "--save", folder, "--save-interval", 1000, fails=True)
        saved = sorted(path.name for path in folder.glob("iter_*"))
        again = run(2, *FLAGS, "--load", folder, "--rerun-mode", "disabled") if saved and "nan" not in case else None
        results.append((exit_codes(done), saved, done.losses, again and again.losses))
    assert results[1][:2] == results[0][:2]
    for got, want in zip(results[1][2:], results[0][2:], strict=True):
        assert got == (want and pytest.approx(want, abs=2e-6))


@pytest.mark.parametrize("error", ["persistent", "correct"])
def test_the_repetition_from_the_checkpoint_ends_as_stocks(error, tmp_path):
    codes = []
    for name, flags in (("stock", ()), ("ours", ours(tmp_path))):
        saving = (*FLAGS, *ENDED[error], *flags, "--save", tmp_path / name, "--save-interval", 1000)
        run(2, *saving, fails=True)
        codes.append(exit_codes(run(2, *saving, "--load", tmp_path / name, fails=True)))
    assert codes[0] == codes[1] != set()


@pytest.mark.parametrize("live", [(), LIVE], ids=["plan", "live"])
@pytest.mark.parametrize("case", ["repeated", "skipped", "evaluation"])
def test_goes_on_as_stock_does(case, live, tmp_path):
    flags = (*FLAGS, *GOES_ON[case])
    want = stock(2, *flags).losses
    done = run(2, *flags, *ours(tmp_path, *live))
    assert len(want) >= 7
    assert done.losses == pytest.approx(want, abs=2e-6)
    assert case != "repeated" or "Continuing normal execution" in done.log


def test_fp16_overflow(tmp_path):
    """Steps are dropped until the loss scale fits. Grouped experts do not compute in fp16 on a CPU."""
    flags = (*FLAGS, *GOES_ON["overflow"][:-2])
    want, got = stock(2, *flags).losses, run(2, *flags, *OURS).losses
    assert 0 < len(want) < LAST
    assert got == pytest.approx(want, abs=1e-4)


def test_what_is_repeated_counts_once(tmp_path):
    traces = []
    for name, flags in (("once", ()), ("twice", GOES_ON["repeated"])):
        recording = ("--scalemoe-trace-path", tmp_path / name, "--scalemoe-trace-interval", 1)
        run(2, *FLAGS, *flags, *ours(tmp_path, *recording))
        traces.append(load_trace(tmp_path / name / "routing.npz"))
    assert traces[0].iterations == traces[1].iterations == [*range(1, LAST + 1)]
    assert np.array_equal(traces[0].counts, traces[1].counts)
