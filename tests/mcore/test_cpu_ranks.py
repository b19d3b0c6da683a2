"""Stock Megatron-Core trains on CPU ranks, in every mode that needs no GPU library."""

import subprocess
import sys

import pytest

from tests.rank_pool import pool

INSTALL = """
import sys, types, torch
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore import cpu_ranks

def refused():
    try:
        cpu_ranks.install()
    except ScaleMoEError as error:
        return str(error)

assert "megatron" not in sys.modules
available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
assert "without CUDA" in refused()
torch.cuda.is_available = available
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
assert "before megatron.core is imported" in refused()
del sys.modules["megatron.core"]
compile_, stream = torch.compile, torch.cuda.Stream
cpu_ranks.install()
cpu_ranks.install()
assert "megatron.core" in sys.modules and torch.cuda.Stream is not stream
assert torch.compile is compile_ and not torch.cuda.is_available()

# the gradient norm is precise however the weights are cut
from megatron.core.optimizer import clip_grads
gradient = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
true = float(gradient.double().norm())
for parts in (1, 8):
    measured = float(clip_grads.l2_norm_impl(0, None, [list(gradient.chunk(parts))], False)[0])
    assert abs(measured / true - 1) < 1e-7, (parts, measured, true)
assert abs(float(gradient.norm()) / true - 1) > 1e-6  # what the repair is for
"""


def test_install():
    subprocess.run([sys.executable, "-W", "ignore", "-c", INSTALL], check=True, timeout=120)


def losses_of(ranks: int, **runs: dict) -> dict[str, list[float]]:
    """The losses of the first steps of each run, by its name; the same on every rank."""
    results = pool(ranks).run(_train, runs)
    assert all(losses == results[0] for losses in results)
    return results[0]


def _train(runs: dict[str, dict]) -> dict[str, list[float]]:
    from tests.mcore.tiny_gpt import Setup, Training

    return {name: Training(Setup(**options)).losses(4) for name, options in runs.items()}


def test_modes_do_not_change_the_loss():
    modes = {
        "overlap": dict(overlap=True),
        "allgather": dict(dispatcher="allgather", distributed_optimizer=True),
        "distributed optimizer, overlap": dict(distributed_optimizer=True, overlap=True),
        "bf16": dict(bf16=True, distributed_optimizer=True),
    }
    plain, *others = losses_of(2, plain=dict(ep=2), **{name: dict(ep=2, **options) for name, options in modes.items()}).values()
    assert plain[-1] < plain[0] - 0.1
    for name, losses in zip(modes, others, strict=True):
        assert losses == pytest.approx(plain, abs=1e-2 if name == "bf16" else 1e-6), name


def test_recomputed_activations_have_the_same_dropout():
    losses = losses_of(2, recomputed=dict(ep=2, dropout=0.3, recompute=True), plain=dict(ep=2, dropout=0.3))
    assert losses["recomputed"] == losses["plain"]


def test_shared_experts_train():
    (losses,) = losses_of(2, shared_expert=dict(ep=2, shared_expert=True)).values()
    assert losses[-1] < losses[0] - 0.05


def test_initial_weights_and_no_warnings_of_rng_forks():
    """As on GPUs: experts differ between expert-parallel ranks, the rest is the same."""
    (expert0, dense0, warnings0), (expert1, dense1, warnings1) = pool(2).run(_initial_weights)
    assert expert0 != expert1
    assert dense0 == dense1
    assert warnings0 == warnings1 == 0


def _initial_weights() -> tuple[list[float], list[float], int]:
    import logging

    from tests.mcore.tiny_gpt import Setup, Training

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        training = Training(Setup(ep=2, dropout=0.1))
        layer = training.model.module.decoder.layers[0]
        weights = [layer.mlp.experts.local_experts[0].linear_fc1.weight[0].tolist(), layer.self_attention.linear_qkv.weight[0].tolist()]
        training.losses(1)
    finally:
        logging.getLogger().removeHandler(handler)
    return *weights, sum("RNG" in record.getMessage() for record in records)
