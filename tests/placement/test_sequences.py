"""Sequences to ranks, and experts to sequences, on synthetic topics."""

import itertools

import numpy as np
import pytest

from megatron_scalemoe.placement.sequences import assign_sequences, cluster_sequences
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable


def one_rank_each(num_ranks: int) -> np.ndarray:
    return np.arange(num_ranks)[:, None]


def test_equal_scores_change_nothing():
    for score_BG in (np.full((12, 4), 0.25), np.tile([0.4, 0.3, 0.2, 0.1], (12, 1)), np.random.default_rng(0).random((12, 1)) * np.ones(4)):
        assert assign_sequences(score_BG, one_rank_each(4)).tolist() == list(range(12))


def test_a_permutation_with_equal_ranks_and_few_moves():
    rng = np.random.default_rng(0)
    score_BG = np.full((16, 4), 0.25)
    score_BG[0] = [0, 0, 1, 0]  # wants from rank 0 to rank 2: somebody there has to go
    cell_B = assign_sequences(score_BG, one_rank_each(4))
    assert cell_B[0] // 4 == 2
    assert (cell_B != np.arange(16)).sum() == 2
    for _ in range(20):
        assert (np.sort(assign_sequences(rng.random((16, 4)), one_rank_each(4))) == np.arange(16)).all()


def test_optimal():
    rng = np.random.default_rng(0)
    for _ in range(10):
        score_BG = rng.random((6, 3))
        rank_B = assign_sequences(score_BG, one_rank_each(3)) // 2
        even = [ranks for ranks in itertools.product(range(3), repeat=6) if np.ptp(np.bincount(ranks, minlength=3)) == 0]
        best = max(score_BG[np.arange(6), ranks].sum() for ranks in even)
        assert score_BG[np.arange(6), rank_B].sum() == pytest.approx(best, abs=1e-5)


def test_ranks_with_the_same_experts_keep_their_own():
    """Two expert-parallel groups: data-parallel ranks 0 and 2 have the same experts, and 1 and 3."""
    score_BG = np.zeros((8, 2))
    score_BG[[0, 1, 4, 6], 0] = 1.0
    score_BG[[2, 3, 5, 7], 1] = 1.0
    cell_B = assign_sequences(score_BG, np.array([[0], [1], [0], [1]]))
    assert cell_B.tolist() == [0, 1, 2, 3, 4, 6, 5, 7]  # 5 leaves rank 2 for the place that 6 left on rank 3


def test_a_rank_of_two_expert_parallel_ranks_scores_their_mean():
    score_BG = np.array([[0.9, 0.0, 0.4, 0.4], [0.3, 0.3, 0.0, 0.0]])
    assert assign_sequences(score_BG, np.array([[0, 1], [2, 3]])).tolist() == [1, 0]  # 0.4 + 0.3 beats 0.45 + 0.0


def topical(seed: int, topics: int, *, strength: float, sequences: int = 64, experts: int = 16, layers: int = 2, length: int = 100):
    """Topics of words, words' experts drawn by topic; tokens int [B, S], choices int [B, L, E], word probabilities."""
    rng = np.random.default_rng(seed)
    words_per_topic = 20
    group_E = rng.permuted(np.tile(np.arange(experts) % topics, (layers, 1)), axis=1)
    topic_B = rng.integers(topics, size=sequences)
    tokens_BS = topic_B[:, None] * words_per_topic + rng.integers(words_per_topic, size=(sequences, length))
    own_LTE = (group_E[:, None] == np.arange(topics)[:, None]).astype(float)
    chosen_LTE = strength * own_LTE / own_LTE.sum(axis=2, keepdims=True) + (1 - strength) / experts
    counts_BLE = np.stack([[rng.multinomial(length, chosen_LTE[layer, topic]) for layer in range(layers)] for topic in topic_B])
    counts_RLE = np.zeros((topics * words_per_topic, layers, experts), np.float32)
    for topic in range(topics):
        for word in range(words_per_topic):
            counts_RLE[topic * words_per_topic + word] = [rng.multinomial(50, chosen_LTE[layer, topic]) for layer in range(layers)]
    return tokens_BS, counts_BLE, AffinityTable(counts_RLE, 1)


def share_on(counts_BLE: np.ndarray, rank_B: np.ndarray, home_rank_LE: np.ndarray) -> float:
    return float((counts_BLE * (home_rank_LE[None] == rank_B[:, None, None])).sum() / counts_BLE.sum())


def test_a_learnt_table_raises_the_local_share():
    """Homes that fit the topics: the table finds which sequence goes where."""
    tokens_BS, counts_BLE, table = topical(0, 4, strength=0.6)
    homes_LE = cluster_sequences(counts_BLE, PlacementPlan.contiguous(2, 4, 16).home_rank, 4, seed=0).home_rank_LE
    hosts = homes_LE[:, :, None] == np.arange(4)
    plan = PlacementPlan.from_hosts(homes_LE, hosts, replica_slots_per_rank=0)
    score_BG = table.sequence_scores(tokens_BS, table.rank_shares(plan))
    rank_B = assign_sequences(score_BG, one_rank_each(4)) // 16
    default_B = np.arange(64) // 16
    assert share_on(counts_BLE, default_B, homes_LE) < 0.3
    assert share_on(counts_BLE, rank_B, homes_LE) > 0.55
    promised, came = score_BG[np.arange(64), rank_B].mean(), share_on(counts_BLE, rank_B, homes_LE)
    assert came - 0.1 < promised < came + 0.02  # smoothing makes it cautious


def test_nothing_to_gain_without_topics():
    tokens_BS, counts_BLE, table = topical(0, 4, strength=0.0)
    plan = PlacementPlan.contiguous(2, 4, 16)
    score_BG = table.sequence_scores(tokens_BS, table.rank_shares(plan))
    rank_B = assign_sequences(score_BG, one_rank_each(4)) // 16
    assert share_on(counts_BLE, rank_B, plan.home_rank) == pytest.approx(0.25, abs=0.02)
    assert score_BG[np.arange(64), rank_B].mean() < 0.28, "the table must not promise what is not there"


@pytest.mark.parametrize("topics", [4, 8])
def test_clusters_beat_contiguous_homes(topics):
    _, counts_BLE, _ = topical(1, topics, strength=0.8)
    contiguous_LE = PlacementPlan.contiguous(2, 4, 16).home_rank
    sequences_only = share_on(counts_BLE, _best_ranks(counts_BLE, contiguous_LE), contiguous_LE)
    clusters = cluster_sequences(counts_BLE, contiguous_LE, 4, seed=0)
    assert clusters.local_share == pytest.approx(share_on(counts_BLE, clusters.rank_B, clusters.home_rank_LE))
    assert clusters.local_share > sequences_only + 0.2
    assert (np.bincount(clusters.rank_B) == 16).all()
    for home_rank_E in clusters.home_rank_LE:
        assert (np.bincount(home_rank_E) == 4).all()


def _best_ranks(counts_BLE: np.ndarray, home_rank_LE: np.ndarray) -> np.ndarray:
    hosted_BG = np.stack([(counts_BLE * (home_rank_LE == rank)).sum(axis=(1, 2)) for rank in range(4)], axis=1)
    return assign_sequences(hosted_BG / counts_BLE.sum(axis=(1, 2))[:, None], one_rank_each(4)) // 16


def test_clusters_of_their_own_homes_change_nothing():
    _, counts_BLE, _ = topical(2, 4, strength=0.8)
    first = cluster_sequences(counts_BLE, PlacementPlan.contiguous(2, 4, 16).home_rank, 4, seed=0)
    again = cluster_sequences(counts_BLE, first.home_rank_LE, 4, seed=1)
    assert again.local_share == first.local_share
    assert (again.home_rank_LE == first.home_rank_LE).all()


def test_tiny_clusters_are_the_best_ones():
    """Every pair of sequence ranks and homes, one layer: brute force."""
    for seed in range(5):
        counts_BLE = np.random.default_rng(seed).integers(0, 50, (4, 1, 4))
        halves = [np.array(ranks) for ranks in itertools.product(range(2), repeat=4) if sum(ranks) == 2]
        best = max(share_on(counts_BLE, rank_B, home_E[None]) for rank_B in halves for home_E in halves)
        found = cluster_sequences(counts_BLE, np.array([[0, 0, 1, 1]]), 2, seed=0, num_starts=8)
        assert found.local_share == pytest.approx(best)
