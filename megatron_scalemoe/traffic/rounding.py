"""Means as whole tokens, without losing the experts that get less than half a one."""

from __future__ import annotations

import numpy as np


def whole_tokens(mean_GE: np.ndarray) -> np.ndarray:
    """float64 [..., G, E] -> int32 of the same shape: each cell rounded up or down, so that no expert's total over the ranks, nor that of
    all experts, changes by a token or more. Rounding each cell by itself would lose every cell below one half.

    The cells of one expert after the other form a running total, whose whole numbers the result's totals are. Each expert's cells begin at
    another rank: else the first ranks would get the tokens of all experts.
    """
    ranks, experts = mean_GE.shape[-2:]
    rank_PE = (np.arange(ranks)[:, None] + np.arange(experts)) % ranks
    index = np.broadcast_to(rank_PE, mean_GE.shape)
    by_expert_EP = np.swapaxes(np.take_along_axis(mean_GE, index, axis=-2), -1, -2)
    total = np.cumsum(by_expert_EP.reshape(*mean_GE.shape[:-2], -1), axis=-1)
    whole_EP = np.diff(np.floor(total + 0.5), axis=-1, prepend=0).reshape(by_expert_EP.shape)
    whole_GE = np.empty(mean_GE.shape, dtype=np.int32)
    np.put_along_axis(whole_GE, index, np.swapaxes(whole_EP, -1, -2).astype(np.int32), axis=-2)
    return whole_GE
