"""How many tokens each expert gets, counted on the device without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def add_counts(tokens_per_expert_E: Tensor, routing_map_TE: Tensor) -> None:
    """Add one step's counts to the running int64 `tokens_per_expert_E`, in place."""
    tokens_per_expert_E += routing_map_TE.sum(0)


def max_over_mean(tokens_per_expert_E: Tensor, num_ranks: int) -> float:
    """Largest over mean rank load, >= 1, when each rank holds an equal contiguous block of experts. 1.0 when nothing was counted."""
    load_G = tokens_per_expert_E.double().reshape(num_ranks, -1).sum(1)
    mean = load_G.mean()
    return float(load_G.max() / mean) if mean > 0 else 1.0


def zipf_logits(logits_TE: Tensor, exponent: float) -> Tensor:
    """Random logits whose top-k is k draws without replacement from a Zipf law: expert e has weight (e + 1) ** -exponent.

    Gumbel top-k (Kool et al., ICML 2019). The gradient passes straight through to `logits_TE`. Draws from the default generator of the
    logits' device.
    """
    rank_E = torch.arange(1, logits_TE.shape[-1] + 1, device=logits_TE.device, dtype=torch.float32)
    noise = -torch.empty_like(logits_TE, dtype=torch.float32).exponential_().log()
    forced = (noise - exponent * rank_E.log()).to(logits_TE.dtype)
    return logits_TE + (forced - logits_TE).detach()
