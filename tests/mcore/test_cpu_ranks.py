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
"""


def test_install():
    subprocess.run([sys.executable, "-W", "ignore", "-c", INSTALL], check=True, timeout=120)


NORM = """
import torch
from megatron_scalemoe.mcore import cpu_ranks
cpu_ranks.install()
from megatron.core.optimizer import clip_grads
gradient = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
true = float(gradient.double().norm())
for parts in (1, 8):
    measured = float(clip_grads.l2_norm_impl(0, None, [list(gradient.chunk(parts))], False)[0])
    assert abs(measured / true - 1) < 1e-7, (parts, measured, true)
assert abs(float(gradient.norm()) / true - 1) > 1e-6  # what the repair is for
"""


def test_the_gradient_norm_is_precise_however_the_weights_are_cut():
    subprocess.run([sys.executable, "-W", "ignore", "-c", NORM], check=True, timeout=120)


def on_ranks(ranks: int, **options) -> list[float]:
    """The losses of the first steps; the same on every rank."""
    results = pool(ranks).run(_train, options)
    assert all(losses == results[0] for losses in results)
    return results[0]


def _train(options: dict) -> list[float]:
    from tests.mcore.tiny_gpt import Setup, Training

    return Training(Setup(**options)).losses(4)


@pytest.fixture(scope="module")
def plain() -> list[float]:
    losses = on_ranks(2, ep=2)
    assert losses[-1] < losses[0] - 0.1
    return losses


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_modes_do_not_change_the_loss(distributed_optimizer, overlap, dispatcher, plain):
    losses = on_ranks(2, ep=2, distributed_optimizer=distributed_optimizer, overlap=overlap, dispatcher=dispatcher)
    assert losses == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("distributed_optimizer", [False, True])
def test_bf16(distributed_optimizer, plain):
    assert on_ranks(2, ep=2, bf16=True, distributed_optimizer=distributed_optimizer) == pytest.approx(plain, abs=1e-2)


def test_recomputed_activations_have_the_same_dropout():
    assert on_ranks(2, ep=2, dropout=0.3, recompute=True) == on_ranks(2, ep=2, dropout=0.3)


def test_shared_expert_on_its_own_stream():
    losses = on_ranks(2, ep=2, shared_expert=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("ranks", "options"), [(2, dict(pp=2)), (4, dict(tp=2, ep=2, dispatcher="allgather")), (4, dict(pp=2, ep=2))])
def test_other_layouts_train(ranks, options):
    """That their losses are right is in test_checkpoint.py, where they start from common weights."""
    losses = on_ranks(ranks, **options)
    assert losses[-1] < losses[0] - 0.05


def test_initial_weights():
    """As on GPUs: experts differ between expert-parallel ranks, the rest is the same."""
    (expert0, dense0), (expert1, dense1) = pool(2).run(_initial_weights)
    assert expert0 != expert1
    assert dense0 == dense1


def _initial_weights() -> tuple[list[float], list[float]]:
    from tests.mcore.tiny_gpt import Setup, Training

    layer = Training(Setup(ep=2)).model.module.decoder.layers[0]
    return layer.mlp.experts.local_experts[0].linear_fc1.weight[0].tolist(), layer.self_attention.linear_qkv.weight[0].tolist()


def test_rng_forks_do_not_warn(caplog):
    assert pool(2).run(_warnings) == [0, 0]


def _warnings() -> int:
    import logging

    from tests.mcore.tiny_gpt import Setup, Training

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger().addHandler(handler)
    try:
        Training(Setup(ep=2, dropout=0.1)).losses(1)
    finally:
        logging.getLogger().removeHandler(handler)
    return sum("RNG" in record.getMessage() for record in records)
