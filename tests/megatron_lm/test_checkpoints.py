"""Checkpoints of the real pretrain_gpt.py: a run in parts has the losses of one that was not interrupted."""

import json

import pytest

from tests.megatron_lm.script import OURS, TOLERANCE, needs_checkout, run, save_some_plan, stock

pytestmark = needs_checkout

EP2 = ("--expert-model-parallel-size", 2)
EP4 = ("--expert-model-parallel-size", 4)
OPTIMIZERS = {"plain": (), "distributed": ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")}


def in_parts(ranks: int, folder, data: tuple, *parts: tuple[int, tuple]) -> list:
    """One run per part, with its last iteration and flags; each goes on where the one before has saved."""
    runs, saved = [], 0
    for last, flags in parts:
        saving = ("--save", folder, "--save-interval", 1000, "--exit-interval", last)
        loading = ("--load", folder) if runs else ()
        runs.append(run(ranks, *flags, *saving, *loading, data=data))
        assert (folder / f"iter_{last:07d}" / "metadata.json").exists()
        assert min(runs[-1].losses) == saved + 1  # it has gone on, not started again
        saved = last
    return runs


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_our_flag_on_and_off_in_mid_training(optimizer, text_data, tmp_path):
    """With dropout. Our checkpoints, from moved experts with replicas, are stock Megatron's; and so the other way round.

    At a lower learning rate, as replicas add gradients in another order: see test_training.py.
    """
    flags = (*EP2, *OPTIMIZERS[optimizer], "--lr", 1e-3, "--min-lr", 1e-4)
    ours = (*flags, *OURS, "--scalemoe-plan", save_some_plan(tmp_path))
    whole = stock(2, *flags, data=text_data)
    parts = in_parts(2, tmp_path / "checkpoints", text_data, (15, flags), (30, ours), (40, ours), (50, flags))
    for part in parts:
        assert part.losses == pytest.approx({step: whole.losses[step] for step in part.losses}, abs=TOLERANCE)
    assert json.loads((tmp_path / "checkpoints/iter_0000030/scalemoe_plan.json").read_text())["num_ranks"] == 2
    assert not (tmp_path / "checkpoints/iter_0000015/scalemoe_plan.json").exists()
    assert "plan" not in parts[2].log.partition("after model, optimizer")[2].partition("iteration       31")[0]


@pytest.mark.parametrize(("before", "after"), [(EP4, EP2), (EP2, EP4)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_expert_parallel_size_changes(optimizer, before, after, text_data, tmp_path):
    """On 4 ranks. Without auxiliary loss and dropout, which depend on which sequences meet on a rank."""
    exact = ("--moe-aux-loss-coeff", 0, "--hidden-dropout", 0, "--attention-dropout", 0, *OPTIMIZERS[optimizer])
    whole = stock(4, *before, *exact, data=text_data)
    first, second = in_parts(4, tmp_path, text_data, (25, (*before, *exact, *OURS)), (50, (*after, *exact, *OURS)))
    assert all(abs(loss - whole.losses[step]) < TOLERANCE for step, loss in {**first.losses, **second.losses}.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_with_dropout_and_loading_workers(optimizer, text_data, tmp_path):
    """The loss is that of an uninterrupted run to the last digit that is logged: the random numbers go on, too."""
    flags = (*EP2, *OPTIMIZERS[optimizer], "--num-workers", 1, *OURS)
    whole = run(2, *flags, data=text_data)
    first, second = in_parts(2, tmp_path, text_data, (25, flags), (50, flags))
    assert first.losses == {step: whole.losses[step] for step in first.losses}
    rounding = 2e-6  # of the second line, which is a mean
    assert second.losses == pytest.approx({step: whole.losses[step] for step in second.losses}, abs=rounding)
