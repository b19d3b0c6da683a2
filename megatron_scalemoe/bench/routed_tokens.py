"""Tokens with skewed routing: what benchmarks dispatch and permute."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class RoutedTokens:
    """The input of one dispatch: x [T, D], probs [T, E], routing_map bool [T, E]."""

    x: Tensor
    probs: Tensor
    routing_map: Tensor


def make_routed_tokens(
    tokens: int, hidden: int, experts: int, topk: int, skew: float, dtype: torch.dtype, seed: int, device: torch.device | int
) -> RoutedTokens:
    """Tokens, each with `topk` distinct experts drawn from a Zipf law with exponent `skew`. The same on every device."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, experts + 1, dtype=torch.float64) ** -skew
    chosen = torch.multinomial(popularity.expand(tokens, -1), topk, generator=generator)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)
    probs = torch.rand(tokens, experts, generator=generator) * routing_map
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return RoutedTokens(x.to(device), probs.to(device), routing_map.to(device))
