"""The affinity table: shares from counts, smoothing, sequences' scores."""

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable

RANKS, EXPERTS, LAYERS, VOCABULARY = 4, 8, 3, 10
PLAN = PlacementPlan.contiguous(LAYERS, RANKS, EXPERTS)


def table_of(seed: int = 0, scale: float = 1e4) -> AffinityTable:
    counts = np.random.default_rng(seed).integers(0, scale, (VOCABULARY, LAYERS, EXPERTS)).astype(np.float32)
    return AffinityTable(counts, 2)


def test_shares_are_the_fraction_that_a_rank_hosts():
    table = table_of()
    share_RG = table.rank_shares(PLAN)
    by_rank = table.counts.reshape(VOCABULARY, LAYERS, RANKS, -1).sum(axis=(1, 3))
    np.testing.assert_allclose(share_RG, by_rank / by_rank.sum(axis=1, keepdims=True), atol=1e-3)  # the prior is small
    np.testing.assert_allclose(share_RG.sum(axis=1), 1.0, rtol=1e-6)


def test_a_replica_hosts_too():
    hosts = np.stack([PLAN.hosts(layer) for layer in range(LAYERS)])
    hosts[:, 0, 3] = True
    plan = PlacementPlan.from_hosts(PLAN.home_rank, hosts, replica_slots_per_rank=1)
    more = table_of().rank_shares(plan) - table_of().rank_shares(PLAN)
    assert (more[:, 3] > 0.01).all()
    np.testing.assert_allclose(more[:, :3], 0, atol=1e-12)


def test_an_empty_table_expects_the_same_everywhere():
    table = AffinityTable.empty(VOCABULARY, LAYERS, EXPERTS, 2)
    np.testing.assert_allclose(table.rank_shares(PLAN), 1 / RANKS)
    assert np.ptp(table.expected_counts(np.zeros((2, 5), dtype=int))) == 0


def test_unseen_ids_get_exactly_the_mean_and_rare_ids_stay_near_it():
    counts = table_of().counts.copy()
    counts[7], counts[8] = 0, 0
    counts[8, :, 0] = 2  # one token
    share_RG = AffinityTable(counts, 2).rank_shares(PLAN)
    mean_G = counts.reshape(VOCABULARY, LAYERS, RANKS, -1).sum(axis=(0, 1, 3)) / counts.sum()
    np.testing.assert_allclose(share_RG[7], mean_G, rtol=1e-6)
    assert mean_G[0] < share_RG[8, 0] < mean_G[0] + 0.15  # without smoothing it would be 1


def test_layers_that_nobody_learnt_count_for_nothing():
    counts = table_of(scale=100).counts.copy()
    counts[:, 1:] = 0
    one_layer = AffinityTable(counts[:, :1], 2).rank_shares(PlacementPlan.contiguous(1, RANKS, EXPERTS))
    np.testing.assert_allclose(AffinityTable(counts, 2).rank_shares(PLAN), one_layer, rtol=1e-6)


def test_scores_are_means_over_tokens_and_ids_wrap():
    table = table_of()
    share_RG = table.rank_shares(PLAN)
    tokens_BS = np.array([[1, 1, 2, 13], [0, 5, 9, 20]])  # 13 is in row 3, 20 in row 0
    expected = np.stack([share_RG[[1, 1, 2, 3]].mean(axis=0), share_RG[[0, 5, 9, 0]].mean(axis=0)])
    np.testing.assert_allclose(table.sequence_scores(tokens_BS, share_RG), expected)


def test_expected_counts_agree_with_scores():
    table = table_of()
    tokens_BS = np.random.default_rng(1).integers(0, VOCABULARY, (6, 500))
    counts_BLE = table.expected_counts(tokens_BS)
    np.testing.assert_allclose(counts_BLE.sum(axis=2), 2 * 500, atol=EXPERTS)
    by_rank = counts_BLE.reshape(6, LAYERS, RANKS, -1).sum(axis=(1, 3)) / counts_BLE.sum(axis=(1, 2))[:, None]
    np.testing.assert_allclose(by_rank, table.sequence_scores(tokens_BS, table.rank_shares(PLAN)), atol=0.005)


def test_old_counts_fade():
    table = table_of().merged(np.ones((VOCABULARY, LAYERS, EXPERTS), dtype=np.float32), 0.5)
    np.testing.assert_allclose(table.counts, table_of().counts * 0.5 + 1)


def test_a_large_vocabulary_shares_rows():
    assert AffinityTable.empty(128_000, 1, 2, 1).num_rows == 8192


@pytest.mark.parametrize(
    ("counts", "topk", "problem"),
    [
        (np.zeros((2, 2), np.float32), 1, "float32 .rows, layers, experts"),
        (np.zeros((2, 1, 2)), 1, "float32"),
        (np.full((2, 1, 2), np.nan, np.float32), 1, "finite"),
        (np.full((2, 1, 2), -1, np.float32), 1, "0 or more"),
        (np.zeros((2, 1, 2), np.float32), 3, "topk"),
        (np.zeros((2, 1, 2), np.float32), None, "topk"),
    ],
)
def test_tables_that_do_not_fit(counts, topk, problem):
    with pytest.raises(ScaleMoEError, match=problem):
        AffinityTable(counts, topk)
