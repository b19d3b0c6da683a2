"""Counts, balance and forced skew."""

import torch

from megatron_scalemoe.ops.token_counts import add_counts, max_over_mean, zipf_logits


def test_counts_add_up():
    counts = torch.zeros(3, dtype=torch.int64)
    routing_map = torch.tensor([[True, False, True], [True, False, False]])
    add_counts(counts, routing_map)
    add_counts(counts, routing_map)
    assert counts.tolist() == [4, 0, 2]


def test_max_over_mean():
    assert max_over_mean(torch.tensor([3, 3, 1, 1]), num_ranks=2) == 1.5
    assert max_over_mean(torch.tensor([3, 3, 1, 1]), num_ranks=1) == 1.0
    assert max_over_mean(torch.zeros(4, dtype=torch.int64), num_ranks=2) == 1.0


def test_zipf_logits_follow_the_law():
    torch.manual_seed(0)
    first = zipf_logits(torch.zeros(40_000, 4), 1.0).argmax(1).bincount(minlength=4).double() / 40_000
    expected = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    torch.testing.assert_close(first, expected / expected.sum(), atol=0.01, rtol=0)


def test_zipf_zero_is_uniform_and_the_gradient_passes():
    torch.manual_seed(0)
    logits = torch.zeros(40_000, 4, requires_grad=True)
    forced = zipf_logits(logits, 0.0)
    share = forced.argmax(1).bincount(minlength=4).double() / 40_000
    torch.testing.assert_close(share, torch.full((4,), 0.25, dtype=torch.float64), atol=0.01, rtol=0)
    forced.sum().backward()
    assert torch.equal(logits.grad, torch.ones_like(logits))
