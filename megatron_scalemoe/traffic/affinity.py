"""`AffinityTable`: which experts the tokens of each id choose; what it says of sequences under a plan.

ScaleMoE predicts a sequence's experts from the epoch before (see `sample_history`). Pre-training sees a sequence once, so the table goes by
token id, as Sem-MoE (arXiv 2503.04398) does for inference: the same token mostly chooses the same experts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import csr_array

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan

MAX_ROWS = 8192
# A row counts as if it had also seen this many average tokens: rarely seen ids are predicted near the mean.
_PRIOR_TOKENS = 8
# float32 counts integers exactly up to here.
_MOST_SELECTIONS = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class AffinityTable:
    """How often tokens of each id chose each expert. R rows, L layers, E experts.

    counts: float32 [R, L, E], 0 or more. Row r is of the token ids v with v % R == r; of id r alone if R is the vocabulary's size. In
        byte-pair vocabularies low ids are the frequent ones, so that a row shared by many ids still is mostly of one.
    topk: experts per token.

    Raises `ScaleMoEError` when shapes, types or values do not fit.
    """

    counts: np.ndarray
    topk: int

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.ndim != 3 or not counts.size or counts.dtype != np.float32:
            raise ScaleMoEError("counts must be float32 [rows, layers, experts]", found=f"{counts.dtype} {counts.shape}")
        if not np.isfinite(counts).all() or counts.min() < 0:
            raise ScaleMoEError("counts must be finite and 0 or more", found=f"{counts.min()}..{counts.max()}")
        if type(self.topk) is not int or not 1 <= self.topk <= counts.shape[2]:
            raise ScaleMoEError(f"topk must be an integer from 1 to the {counts.shape[2]} experts", found=repr(self.topk))

    @classmethod
    def empty(cls, vocab_size: int, num_layers: int, num_experts: int, topk: int, *, max_rows: int = MAX_ROWS) -> AffinityTable:
        """A table that has learnt nothing. It takes rows x layers x experts x 4 bytes: 8192 x 24 x 64 are 50 MB."""
        return cls(np.zeros((min(vocab_size, max_rows), num_layers, num_experts), dtype=np.float32), topk)

    @property
    def num_rows(self) -> int:
        return self.counts.shape[0]

    def merged(self, new_RLE: np.ndarray, keep: float) -> AffinityTable:
        """A table with `keep` (0 to 1) times the old counts, and new ones: float32 [R, L, E]. Routing drifts, so old counts must fade."""
        assert 0.0 <= keep <= 1.0 and new_RLE.shape == self.counts.shape
        return AffinityTable(np.minimum(self.counts * np.float32(keep) + new_RLE, np.float32(_MOST_SELECTIONS)), self.topk)

    def rank_shares(self, plan: PlacementPlan) -> np.ndarray:
        """float64 [R, G]: expected share of the selections of a row's tokens, over the layers learnt, that rank g hosts (a replica hosts).

        An empty table expects every expert equally often.
        """
        hosts_FG = self._hosts(plan)
        counts_RF = self.counts.reshape(self.num_rows, -1)
        all_F = counts_RF.sum(axis=0, dtype=np.float64)
        if not all_F.any():
            return np.tile(hosts_FG.mean(axis=0), (self.num_rows, 1))
        mean_G = all_F @ hosts_FG / all_F.sum()
        learnt_layers = int(all_F.reshape(self.counts.shape[1:]).any(axis=1).sum())
        prior = _PRIOR_TOKENS * self.topk * learnt_layers
        hosted_RG = (counts_RF @ hosts_FG.astype(np.float32)).astype(np.float64)
        total_R = counts_RF.sum(axis=1, dtype=np.float64)
        return (hosted_RG + prior * mean_G) / (total_R[:, None] + prior)

    def expected_counts(self, tokens_BS: np.ndarray) -> np.ndarray:
        """int64 [B, L, E]: the selections expected of each sequence, of ids int [B, S]: what `placement.sequences.cluster_sequences` takes.

        All sequences have about the same total (S x topk in each layer learnt), whatever is known of their tokens.
        """
        layers, experts = self.counts.shape[1:]
        total_RL1 = self.counts.sum(axis=2, keepdims=True, dtype=np.float64)
        all_LE = self.counts.sum(axis=0, dtype=np.float64)
        mean_LE = all_LE / np.maximum(all_LE.sum(axis=1, keepdims=True), 1.0)
        prior = _PRIOR_TOKENS * self.topk
        share_RLE = (self.counts + prior * mean_LE) / (total_RL1 + prior)
        expected_BF = self._histogram(tokens_BS) @ share_RLE.reshape(self.num_rows, -1)
        return np.rint(expected_BF * self.topk).astype(np.int64).reshape(-1, layers, experts)

    def sequence_scores(self, tokens_BS: np.ndarray, share_RG: np.ndarray) -> np.ndarray:
        """float64 [B, G]: expected share of each sequence's selections that rank g hosts.

        tokens_BS: int [B, S], ids. share_RG: of `rank_shares`.
        """
        return self._histogram(tokens_BS) @ share_RG / tokens_BS.shape[1]

    def _histogram(self, tokens_BS: np.ndarray) -> csr_array:
        """Sparse [B, R]: how often each sequence has a row's tokens."""
        sequences, length = tokens_BS.shape
        row_of_token = (np.asarray(tokens_BS, dtype=np.int64) % self.num_rows).reshape(-1)
        starts = np.arange(sequences + 1) * length
        return csr_array((np.ones(row_of_token.size), row_of_token, starts), shape=(sequences, self.num_rows))

    def _hosts(self, plan: PlacementPlan) -> np.ndarray:
        """float64 [L * E, G]."""
        assert self.counts.shape[1:] == (plan.num_layers, plan.num_logical_experts), "table and plan are of different models"
        return stacked_hosts(plan).reshape(-1, plan.num_ranks)


def stacked_hosts(plan: PlacementPlan) -> np.ndarray:
    """float64 [L, E, G]: 1 where a rank holds a copy of an expert."""
    return np.stack([plan.hosts(layer) for layer in range(plan.num_layers)]).astype(np.float64)
