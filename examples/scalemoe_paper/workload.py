"""The routed tokens of the paper's training runs, made by `traffic.synthetic`: before clustering and after it.

Suffixes: L layers, G ranks, E experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from paper import EXPERTS, LAYERS, RANKS, TOKENS_PER_RANK, TOPK, ZIPF_EXPONENT
from scipy.optimize import linear_sum_assignment

from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import RoutingTrace

_SIZES = {"ranks": RANKS, "experts": EXPERTS, "layers": LAYERS, "topk": TOPK, "tokens_per_rank": TOKENS_PER_RANK}
_ONE_STEP = {"steps": 1, "drift": 0.0, "coactivation": False}
_BISECTIONS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """One iteration's tokens and where their experts live. home_rank_LE: int64 [L, E]."""

    trace: RoutingTrace
    home_rank_LE: np.ndarray

    @property
    def local_share(self) -> float:
        """Of all selections, those whose expert is on the token's rank."""
        counts_LGE = self.trace.counts[0]
        at_home_LGE = self.home_rank_LE[:, None] == np.arange(RANKS)[:, None]
        return float(counts_LGE[at_home_LGE].sum() / counts_LGE.sum())


def before_clustering(seed: int) -> Workload:
    """Sequences dealt out at random, experts in Megatron's order: the source rank says nothing about the expert."""
    trace = synthesize("zipf", skew=ZIPF_EXPONENT, seed=seed, **_SIZES, **_ONE_STEP)
    return Workload(trace, np.tile(np.repeat(np.arange(RANKS), EXPERTS // RANKS), (LAYERS, 1)))


def after_clustering(local_share: float, seed: int) -> Workload:
    """Sequences and experts in one cluster per rank, tied so closely that `local_share` of the selections stay on their rank.

    Clusters are on ranks in random order. Replicas are not modelled one by one: the share they reach (Table III) is given, and the
    strength of the tie that gives it is found by bisection.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        workload = _clustered(middle, seed)
        low, high = (middle, high) if workload.local_share < local_share else (low, middle)
    return workload


def _clustered(source_affinity: float, seed: int) -> Workload:
    affinity = {"groups": RANKS, "source_affinity": source_affinity}
    trace = synthesize("clustered", skew=ZIPF_EXPONENT, seed=seed, **affinity, **_SIZES, **_ONE_STEP)
    return Workload(trace, np.stack([_most_local_homes(counts_GE) for counts_GE in trace.counts[0]]))


def _most_local_homes(counts_GE: np.ndarray) -> np.ndarray:
    """int64 [E]: each expert on the rank whose tokens choose it, as far as E/G fit on a rank: the best such assignment."""
    homes_per_rank = EXPERTS // RANKS
    slot, expert = linear_sum_assignment(np.repeat(counts_GE, homes_per_rank, axis=0), maximize=True)
    home_rank_E = np.empty(EXPERTS, dtype=np.int64)
    home_rank_E[expert] = slot // homes_per_rank
    return home_rank_E
