import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.exchange import exchange_phases, padded_rows
from megatron_scalemoe.errors import ScaleMoEError


def hops_of(source: int, target: int, node_of_rank: np.ndarray, exchange: str) -> list[int]:
    """Where a row is after each phase, without deduplication."""
    mates = [np.flatnonzero(node_of_rank == node).tolist() for node in range(node_of_rank.max() + 1)]
    a, b = mates[node_of_rank[source]], mates[node_of_rank[target]]
    if exchange == "flat" or len(mates) == 1:
        return [target]
    if exchange == "1dh":
        return [target] * 3 if a == b else [a[0], b[0], target]
    return [a[b.index(target)], target]


def phases_row_by_row(bytes_GG, node_of_rank, exchange):
    ranks = len(bytes_GG)
    phases = None
    for source in range(ranks):
        for target in range(ranks):
            hops = hops_of(source, target, node_of_rank, exchange)
            phases = phases if phases is not None else [np.zeros((ranks, ranks)) for _ in hops]
            at = source
            for phase, to in zip(phases, hops, strict=True):
                if at != to:
                    phase[at, to] += bytes_GG[source, target]
                at = to
            assert at == target
    return phases


@st.composite
def clusters(draw, *, equal_nodes: bool):
    """(rng, node_of_rank), the ranks of the nodes interleaved at random, node 0 first."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    sizes = [sizes[0]] * len(sizes) if equal_nodes else sizes
    return rng, rng.permutation(np.repeat(np.arange(len(sizes)), sizes))


@settings(deadline=None)
@given(clusters(equal_nodes=True))
def test_phases_are_the_sum_of_each_rows_hops(cluster):
    rng, node_of_rank = cluster
    bytes_GG = rng.integers(0, 100, (node_of_rank.size, node_of_rank.size)).astype(float)
    for exchange in ("flat", "1dh", "2dh"):
        phases = exchange_phases(bytes_GG, node_of_rank, exchange)
        for phase, expected in zip(phases, phases_row_by_row(bytes_GG, node_of_rank, exchange), strict=True):
            np.testing.assert_allclose(phase, expected, atol=1e-9)


@settings(deadline=None)
@given(clusters(equal_nodes=False))
def test_what_a_rank_keeps_after_all_phases_is_what_was_sent_to_it(cluster):
    rng, node_of_rank = cluster
    bytes_GG = rng.integers(0, 100, (node_of_rank.size, node_of_rank.size)).astype(float)
    for exchange in ("flat", "1dh"):
        held = bytes_GG.sum(axis=1)
        for phase in exchange_phases(bytes_GG, node_of_rank, exchange):
            assert (phase >= 0).all() and not phase.diagonal().any()
            held = held - phase.sum(axis=1) + phase.sum(axis=0)
        np.testing.assert_allclose(held, bytes_GG.sum(axis=0), atol=1e-9)


def tokens_with_destinations(rng, ranks, tokens=200, topk=3):
    """Per token: its source rank and the set of ranks that it goes to."""
    return [(int(rng.integers(ranks)), set(rng.integers(0, ranks, topk).tolist())) for _ in range(tokens)]


@settings(deadline=None)
@given(clusters(equal_nodes=True))
def test_deduplicated_2dh_sends_each_token_once_to_each_node_and_on_to_each_of_its_ranks(cluster):
    rng, node_of_rank = cluster
    ranks, nodes = node_of_rank.size, node_of_rank.max() + 1
    mates = [np.flatnonzero(node_of_rank == node).tolist() for node in range(nodes)]
    rows_GG, rows_to_nodes_GN = np.zeros((ranks, ranks)), np.zeros((ranks, nodes))
    between, inside = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
    for source, targets in tokens_with_destinations(rng, ranks):
        local = mates[node_of_rank[source]].index(source)
        for node in {int(node_of_rank[t]) for t in targets}:
            rows_to_nodes_GN[source, node] += 1
            relay = mates[node][local]
            between[source, relay] += relay != source
            for target in targets & set(mates[node]):
                rows_GG[source, target] += 1
                inside[relay, target] += relay != target
    expected = [between, inside] if nodes > 1 else [inside]
    for phase, twin in zip(exchange_phases(rows_GG, node_of_rank, "2dh", rows_to_nodes_GN), expected, strict=True):
        np.testing.assert_allclose(phase, twin, atol=1e-9)


def test_2dh_refuses_nodes_of_different_sizes_and_names_them():
    with pytest.raises(ScaleMoEError, match=r"node 0 has 2 ranks, node 1 has 1"):
        exchange_phases(np.ones((3, 3)), np.array([0, 0, 1]), "2dh")


def test_the_input_is_left_as_it_was():
    bytes_GG = np.ones((4, 4))
    exchange_phases(bytes_GG, np.array([0, 0, 1, 1]), "flat")
    assert (bytes_GG == 1).all()


def test_padding_sends_full_capacity_for_every_slot_to_every_rank():
    np.testing.assert_array_equal(padded_rows(4, slots_per_rank=2, capacity=16), np.full((4, 4), 32.0))
