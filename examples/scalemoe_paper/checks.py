"""What must come out as in the paper: the order of the stages in every column, and the gap between the networks.

Suffixes: S stages, C columns, M models (BERT, GPT).
"""

from __future__ import annotations

import numpy as np
from paper import COLUMNS

_MODELS = ("BERT", "GPT")
_PAIRS = [[COLUMNS.index(f"{network} {model}") for model in _MODELS] for network in ("homogeneous", "heterogeneous")]


def stages_in_order(seconds_SC: np.ndarray) -> np.ndarray:
    """bool [C]: whether each stage is faster than the one before it."""
    return (np.diff(seconds_SC, axis=0) < 0).all(axis=0)


def slowdown(seconds_SC: np.ndarray) -> np.ndarray:
    """float64 [S, M]: heterogeneous / homogeneous."""
    homogeneous, heterogeneous = _PAIRS
    return seconds_SC[:, heterogeneous] / seconds_SC[:, homogeneous]


def gap_limit(paper_s_SC: np.ndarray) -> float:
    """Between the paper's least slowdown of the baseline and its greatest of the later stages: their geometric mean."""
    slowdown_SM = slowdown(paper_s_SC)
    return float(np.sqrt(slowdown_SM[0].min() * slowdown_SM[1:].max()))


def gap_comes_out(seconds_SC: np.ndarray, paper_s_SC: np.ndarray) -> bool:
    """The slow node hurts every stage, the baseline much (above the limit), the later ones little (below it)."""
    slowdown_SM, limit = slowdown(seconds_SC), gap_limit(paper_s_SC)
    return bool((slowdown_SM > 1).all() and (slowdown_SM[0] > limit).all() and (slowdown_SM[1:] < limit).all())
