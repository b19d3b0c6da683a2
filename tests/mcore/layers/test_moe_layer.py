"""Our router counts what it routed, once per trained token, and can force a skew."""

import pytest
import torch

from megatron_scalemoe.config import ScaleMoEConfig
from tests.rank_pool import pool

RECOMPUTE = (("recompute_granularity", "selective"), ("recompute_modules", ["moe"]))


def routed_counts(options: tuple, training: bool, config: ScaleMoEConfig) -> list[int]:
    """`tokens_per_expert` after two forwards and backwards of 24 tokens, top-2."""
    from tests.mcore.megatron_case import LayerCase, make_layer

    layer = make_layer(LayerCase(options=options, scalemoe=config), "scalemoe").train(training)
    for _ in range(2):
        x = torch.randn(12, 2, 16, requires_grad=True)
        layer(x)[0].sum().backward()
    return layer.router.tokens_per_expert.tolist()


@pytest.mark.parametrize(("options", "training", "counted"), [((), True, 2 * 24 * 2), (RECOMPUTE, True, 2 * 24 * 2), ((), False, 0)])
def test_each_token_is_counted_once_and_in_training_only(options, training, counted):
    for counts in pool(2).run(routed_counts, options, training, ScaleMoEConfig()):
        assert sum(counts) == counted


def test_forced_skew():
    skewed = pool(2).run(routed_counts, (), True, ScaleMoEConfig(force_skew=3.0))
    for counts in skewed:
        assert counts[0] > 40, counts  # nearly every one of 48 tokens
        assert sum(counts[:4]) > 0.85 * sum(counts)
    assert skewed[0] != skewed[1], "both ranks drew the same numbers"


def zipf_shares(exponent: float) -> tuple[list[float], bool]:
    """How often each of four experts is first, and whether the gradient passes."""
    from megatron_scalemoe.mcore.layers.moe_layer import zipf_logits

    torch.manual_seed(0)
    logits = torch.zeros(40_000, 4, requires_grad=True)
    forced = zipf_logits(logits, exponent)
    forced.sum().backward()
    return (forced.argmax(1).bincount(minlength=4) / 40_000).tolist(), torch.equal(logits.grad, torch.ones_like(logits))


@pytest.mark.parametrize(("exponent", "weights"), [(1.0, [1, 1 / 2, 1 / 3, 1 / 4]), (0.0, [1, 1, 1, 1])])
def test_skew_follows_zipfs_law(exponent, weights):
    for shares, gradient_passes in pool(2).run(zipf_shares, exponent):
        assert shares == pytest.approx([weight / sum(weights) for weight in weights], abs=0.01)
        assert gradient_passes


def skewed_with_recomputation() -> float:
    """Difference of the input gradient with and without recomputation, under forced skew: both forwards must route alike."""
    from tests.mcore.megatron_case import LayerCase, run_layer

    config = ScaleMoEConfig(force_skew=1.0)
    plain = run_layer(LayerCase(scalemoe=config), "scalemoe")
    again = run_layer(LayerCase(scalemoe=config, options=RECOMPUTE), "scalemoe")
    return float((plain["grad x"] - again["grad x"]).abs().max())


def test_recomputation_draws_the_same_skew():
    assert pool(2).run(skewed_with_recomputation) == [0.0, 0.0]
