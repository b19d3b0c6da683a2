"""Rows and shares against tokens that are really drawn and sent, one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.traffic.matrices import (
    SMALL,
    distinct_factor,
    rows_between_ranks,
    rows_to_nodes,
    selections_between_ranks,
    share_of_slots,
)
from megatron_scalemoe.traffic.trace import LayerTraffic

NODE_OF_RANK = np.array([0, 0, 1, 1])


def draw_tokens(ranks: int, experts: int, topk: int, tokens: int, seed: int, groups: int = 1) -> np.ndarray:
    """int [G, T, K]: the experts of each token, distinct; those of a token's group are likelier together. Sources are alike."""
    rng = np.random.default_rng(seed)
    base_ZE = rng.normal(0, 1, experts) + 2.5 * (np.arange(experts) % groups == np.arange(groups)[:, None])
    logits = base_ZE[rng.integers(groups, size=(ranks, tokens))] + rng.gumbel(size=(ranks, tokens, experts))
    return np.argsort(-logits, axis=2)[:, :, :topk]


def traffic_of(chosen_GTK: np.ndarray, experts: int, coactivation: bool = True) -> LayerTraffic:
    onehot = np.zeros((*chosen_GTK.shape[:2], experts))
    np.put_along_axis(onehot, chosen_GTK, 1.0, axis=2)
    flat = onehot.reshape(-1, experts)
    pairs = flat.T @ flat
    np.fill_diagonal(pairs, 0.0)
    counts = onehot.sum(axis=1)
    return LayerTraffic(counts, pairs if coactivation else None, counts.sum(axis=0)[None], chosen_GTK.shape[2])


def send(chosen_GTK: np.ndarray, slots_P: np.ndarray, num_ranks: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each selection goes to a random slot of its expert: tokens_GP, distinct rows [G, G], distinct rows to nodes [G, N]."""
    rng = np.random.default_rng(seed)
    ranks = chosen_GTK.shape[0]
    tokens_GP = np.zeros((ranks, slots_P.size), dtype=np.int64)
    rows_GG, rows_GN = np.zeros((ranks, num_ranks)), np.zeros((ranks, NODE_OF_RANK.max() + 1))
    for source in range(ranks):
        for token in chosen_GTK[source]:
            slots = [rng.choice(np.flatnonzero(slots_P == expert)) for expert in token]
            np.add.at(tokens_GP[source], slots, 1)
            visited = {slot // (slots_P.size // num_ranks) for slot in slots}
            for rank in visited:
                rows_GG[source, rank] += 1
            for node in {NODE_OF_RANK[rank] for rank in visited}:
                rows_GN[source, node] += 1
    return tokens_GP, rows_GG, rows_GN


SLOTS_PLAIN = np.array([3, 0, 5, 6, 1, 2, 7, 4])
# The last slot of each rank is for replicas.
SLOTS_REPLICAS = np.array([3, 0, 5, 5, 6, 0, 1, 2, EMPTY, 7, 4, 0])


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_of_top_2_tokens_are_exact_in_total_and_near_per_source(groups):
    chosen = draw_tokens(4, 8, 2, 2000, seed=1, groups=groups)
    traffic = traffic_of(chosen, 8)
    tokens_GP, rows_GG, rows_GN = send(chosen, SLOTS_PLAIN, 4, seed=2)
    rows = rows_between_ranks(tokens_GP, SLOTS_PLAIN, 4, traffic)
    np.testing.assert_allclose(rows.sum(axis=0), rows_GG.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(rows, rows_GG, rtol=0.05)
    to_nodes = rows_to_nodes(tokens_GP, SLOTS_PLAIN, NODE_OF_RANK, traffic)
    np.testing.assert_allclose(to_nodes.sum(axis=0), rows_GN.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(to_nodes, rows_GN, rtol=0.05)
    assert rows_GN.sum() < 0.95 * rows_GG.sum() < 0.95 * 0.95 * tokens_GP.sum()


def test_rows_of_top_2_tokens_with_replicas_are_right_up_to_the_chance_of_the_split():
    chosen = draw_tokens(4, 8, 2, 2000, seed=3, groups=3)
    tokens_GP, rows_GG, rows_GN = send(chosen, SLOTS_REPLICAS, 4, seed=4)
    traffic = traffic_of(chosen, 8)
    rows = rows_between_ranks(tokens_GP, SLOTS_REPLICAS, 4, traffic)
    np.testing.assert_allclose(rows.sum(axis=0), rows_GG.sum(axis=0), rtol=0.01)
    to_nodes = rows_to_nodes(tokens_GP, SLOTS_REPLICAS, NODE_OF_RANK, traffic)
    np.testing.assert_allclose(to_nodes.sum(axis=0), rows_GN.sum(axis=0), rtol=0.01)


@pytest.mark.parametrize(("topk", "within"), [(4, 0.12), (6, 0.05)])
def test_rows_of_more_choices_are_a_close_lower_bound(topk, within):
    chosen = draw_tokens(4, 8, topk, 1000, seed=5, groups=2)
    tokens_GP, rows_GG, rows_GN = send(chosen, SLOTS_PLAIN, 4, seed=6)
    traffic = traffic_of(chosen, 8)
    for ours, true in (
        (rows_between_ranks(tokens_GP, SLOTS_PLAIN, 4, traffic), rows_GG),
        (rows_to_nodes(tokens_GP, SLOTS_PLAIN, NODE_OF_RANK, traffic), rows_GN),
    ):
        assert (ours.sum(axis=0) <= true.sum(axis=0) * (1 + 1e-12)).all()
        assert (ours.sum(axis=0) >= true.sum(axis=0) * (1 - within)).all()


def test_without_coactivation_experts_are_taken_as_independent():
    rng = np.random.default_rng(7)
    chance_E = rng.dirichlet(np.full(16, 2.0)) * 3
    chosen_GTE = rng.random((4, 20000, 16)) < chance_E
    slots_P = rng.permutation(16)
    tokens_GP = chosen_GTE.sum(axis=1)[:, slots_P]
    arrived_GTP = chosen_GTE[:, :, slots_P]
    traffic = LayerTraffic(chosen_GTE.sum(axis=1).astype(float), None, np.zeros((1, 16)), 3)
    for ours, groups in (
        (rows_between_ranks(tokens_GP, slots_P, 4, traffic), 4),
        (rows_to_nodes(tokens_GP, slots_P, NODE_OF_RANK, traffic), 2),
    ):
        true = arrived_GTP.reshape(4, 20000, groups, -1).any(axis=3).sum(axis=1)
        np.testing.assert_allclose(ours, true, rtol=0.03)
        assert (true.sum(axis=0) < 0.9 * arrived_GTP.reshape(4, 20000, groups, -1).sum(axis=(0, 1, 3))).all()


def test_one_choice_per_token_is_one_row_and_so_is_no_deduplication():
    chosen = draw_tokens(4, 8, 1, 50, seed=9)
    tokens_GP, rows_GG, rows_GN = send(chosen, SLOTS_REPLICAS, 4, seed=10)
    np.testing.assert_array_equal(rows_between_ranks(tokens_GP, SLOTS_REPLICAS, 4, traffic_of(chosen, 8)), rows_GG)
    np.testing.assert_array_equal(rows_to_nodes(tokens_GP, SLOTS_REPLICAS, NODE_OF_RANK, traffic_of(chosen, 8)), rows_GN)
    chosen = draw_tokens(4, 8, 3, 50, seed=11)
    tokens_GP, rows_GG, _ = send(chosen, SLOTS_REPLICAS, 4, seed=12)
    all_rows = rows_between_ranks(tokens_GP, SLOTS_REPLICAS, 4, traffic_of(chosen, 8), deduplicate=False)
    np.testing.assert_array_equal(all_rows, selections_between_ranks(tokens_GP, 4))
    assert all_rows.sum() == 4 * 50 * 3 > rows_GG.sum()


def test_shares_follow_the_slots():
    tokens_GP = np.array([[4, 2, 0], [0, 6, 0]])
    slots_P = np.array([1, 1, EMPTY])
    np.testing.assert_allclose(share_of_slots(tokens_GP, slots_P, 3, 3), [[0, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 0]])
    np.testing.assert_array_equal(selections_between_ranks(tokens_GP, 3), tokens_GP)


def dawson_sankoff(share_EX: np.ndarray, traffic: LayerTraffic) -> np.ndarray:
    """The formula as written: the largest of the bounds for r = 1..topk-1."""
    load = traffic.counts.sum(axis=0)
    experts, groups = share_EX.shape
    result = np.ones(groups)
    for x in range(groups):
        first = sum(load[e] * share_EX[e, x] for e in range(experts))
        pairs = [(e, f) for e in range(experts) for f in range(e)]
        second = sum(traffic.coactivation[e, f] * share_EX[e, x] * share_EX[f, x] for e, f in pairs)
        if first > 0:
            result[x] = max(2 / (r + 1) * first - 2 / (r * (r + 1)) * second for r in range(1, traffic.topk)) / first
    return result


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_factor_is_the_largest_bound_stays_in_range_and_merged_groups_need_no_more_rows(topk, groups, seed):
    rng = np.random.default_rng(seed)
    traffic = traffic_of(draw_tokens(2, 6, topk, 40, seed=seed, groups=groups), 6)
    share_EX = rng.dirichlet(np.ones(4), size=6) * (rng.random((6, 4)) < 0.7)
    factor_X = distinct_factor(share_EX, traffic)
    np.testing.assert_allclose(factor_X, np.clip(dawson_sankoff(share_EX, traffic), 1 / topk, 1), rtol=1e-9)
    load_E = traffic.counts.sum(axis=0)
    merged_EX = share_EX.reshape(6, 2, 2).sum(axis=2)
    rows_X, merged_X = load_E @ share_EX * factor_X, load_E @ merged_EX * distinct_factor(merged_EX, traffic)
    assert (merged_X <= rows_X.reshape(2, 2).sum(axis=1) * (1 + 1e-9)).all()


def test_large_and_small_shares_are_treated_alike():
    rng = np.random.default_rng(13)
    pairs = 60 * rng.random((300, 300))
    pairs += pairs.T
    np.fill_diagonal(pairs, 0)
    share_EX = np.eye(100)[rng.integers(100, size=300)] * 0.7
    share_EX[np.arange(300), rng.integers(100, size=300)] += 0.3
    traffic = LayerTraffic(rng.random((4, 300)) * 400, pairs, np.zeros((1, 300)), 4)
    blocks = [distinct_factor(share_EX[:, x : x + 3], traffic) for x in range(0, 100, 3)]
    assert share_EX.size > SMALL >= share_EX[:, :3].size
    np.testing.assert_allclose(distinct_factor(share_EX, traffic), np.concatenate(blocks), rtol=1e-12)
    assert 0.25 < np.concatenate(blocks).min() < 0.9


def test_no_traffic_has_factor_one():
    silent = LayerTraffic(np.zeros((2, 4)), np.zeros((4, 4)), np.zeros((1, 4)), 2)
    np.testing.assert_array_equal(distinct_factor(np.ones((4, 3)), silent), np.ones(3))
    no_pairs = LayerTraffic(np.zeros((2, 4)), None, np.zeros((1, 4)), 2)
    np.testing.assert_array_equal(distinct_factor(np.ones((4, 3)), no_pairs), np.ones(3))
