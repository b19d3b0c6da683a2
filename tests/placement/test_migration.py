"""Migration: minimal moves, rounds that never lose an expert, bytes and time. The slots are simulated, round by round."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.migration import (
    Moves,
    align_plan,
    interchangeable_ranks,
    migration_bytes,
    migration_us,
    moves,
    replicas_removed,
    rounds,
    state_bytes,
)
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan
from megatron_scalemoe.topology.ports import two_level_ports
from tests.placement.tiny import random_ports


def random_plan(rng: np.random.Generator, layers: int, ranks: int, per_rank: int, replica_slots: int, change: float = 1.0) -> PlacementPlan:
    """Contiguous homes of which a part was passed around, and replicas in random slots."""
    experts, slots = ranks * per_rank, []
    for _ in range(layers):
        order = np.arange(experts)
        moved = rng.choice(experts, int(change * experts), replace=False)
        order[np.sort(moved)] = order[moved]
        homes_GS = order.reshape(ranks, per_rank)
        replicas_GS = np.full((ranks, replica_slots), EMPTY)
        for rank in range(ranks):
            others = np.setdiff1d(np.arange(experts), homes_GS[rank])
            some = rng.choice(others, min(rng.integers(replica_slots + 1), others.size), replace=False)
            replicas_GS[rank, rng.permutation(replica_slots)[: some.size]] = some
        slots.append(np.concatenate([homes_GS, replicas_GS], axis=1).reshape(-1))
    return PlacementPlan(np.stack(slots), ranks, experts)


PAIRS = st.tuples(
    st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2), st.sampled_from([0.0, 0.3, 1.0])
)


def pair_of_plans(pair: tuple) -> tuple[PlacementPlan, PlacementPlan]:
    seed, layers, ranks, per_rank, replica_slots, change = pair
    rng = np.random.default_rng(seed)
    return tuple(random_plan(rng, layers, ranks, per_rank, replica_slots, change) for _ in range(2))


def migrate(old: PlacementPlan, moved: Moves) -> list[list[set[int]]]:
    """Performs the rounds on sets of homes [layer][rank], checking after each arrival that nothing is lost and memory is bounded."""
    held = [[set(row) for row in layer.reshape(old.num_ranks, -1)[:, : old.homes_per_rank].tolist()] for layer in old.physical_to_logical]
    everyone = set(range(old.num_logical_experts))
    for chosen in rounds(moved, old.num_ranks):
        assert chosen.size
        for ends in (moved.source[chosen], moved.destination[chosen]):
            assert np.unique(ends).size == chosen.size, "a rank sends, or receives, twice in a round"
        for i in chosen:
            layer, expert, source, destination = moved.layer[i], moved.expert[i], moved.source[i], moved.destination[i]
            assert expert in held[layer][source], "the source does not have it (yet, or any more)"
            held[layer][destination].add(int(expert))
            assert len(held[layer][destination]) <= old.homes_per_rank + 1, "more than one spare"
        for i in chosen:
            held[moved.layer[i]][moved.source[i]].remove(int(moved.expert[i]))
            assert set().union(*held[moved.layer[i]]) == everyone
        for layer in np.unique(moved.layer[chosen]):
            assert all(len(homes) == old.homes_per_rank for homes in held[layer])
    return held


@settings(max_examples=120, deadline=None)
@given(pair=PAIRS)
def test_rounds_lead_from_the_old_plan_to_the_new_one_and_never_lose_an_expert(pair):
    old, new = pair_of_plans(pair)
    moved = moves(old, new)
    held = migrate(old, moved)
    for layer, rank in itertools.product(range(new.num_layers), range(new.num_ranks)):
        assert held[layer][rank] == set(np.flatnonzero(new.home_rank[layer] == rank))


@settings(max_examples=60, deadline=None)
@given(pair=PAIRS)
def test_rounds_are_as_few_as_the_busiest_rank_allows(pair):
    old, new = pair_of_plans(pair)
    moved = moves(old, new)
    sent_LG = np.zeros((old.num_layers, old.num_ranks), dtype=int)
    np.add.at(sent_LG, (moved.layer[moved.is_home], moved.source[moved.is_home]), 1)
    plan = rounds(moved, old.num_ranks)
    assert len(plan) == sent_LG.max(axis=1).sum()
    done = np.concatenate([np.empty(0, dtype=int), *plan])
    assert np.array_equal(np.sort(done), np.flatnonzero(moved.is_home))


@settings(max_examples=60, deadline=None)
@given(pair=PAIRS)
def test_moves_are_the_difference_of_the_plans(pair):
    old, new = pair_of_plans(pair)
    moved, expected = moves(old, new), []
    for layer in range(old.num_layers):
        had, has = (plan.hosts(layer) & (plan.home_rank[layer][:, None] != np.arange(plan.num_ranks)) for plan in (old, new))
        for expert in range(old.num_logical_experts):
            a, b = old.home_rank[layer, expert], new.home_rank[layer, expert]
            if a != b:
                expected.append((layer, expert, a, b, True))
            expected += [(layer, expert, b, r, False) for r in range(old.num_ranks) if has[expert, r] and not had[expert, r]]
    found = zip(moved.layer, moved.expert, moved.source, moved.destination, moved.is_home, strict=True)
    assert sorted(expected) == sorted(tuple(map(int, row)) for row in found)


def test_replicas_that_go_are_counted_and_one_that_becomes_the_home_is_gone_as_a_replica():
    old = PlacementPlan(np.array([[0, 1, 1, 0]]), 2, 2)  # rank 0: home 0, replica 1; rank 1: home 1, replica 0
    new = PlacementPlan(np.array([[1, EMPTY, 0, EMPTY]]), 2, 2)
    assert replicas_removed(old, new).tolist() == [2]
    assert replicas_removed(new, old).tolist() == [0]
    assert replicas_removed(old, old).tolist() == [0]


@settings(max_examples=60, deadline=None)
@given(pair=PAIRS)
def test_without_interchangeable_ranks_alignment_keeps_every_expert_on_its_rank_and_unmoved_ones_in_their_slots(pair):
    old, new = pair_of_plans(pair)
    aligned = align_plan(old, new)
    assert np.array_equal(aligned.home_rank, new.home_rank)
    for layer in range(new.num_layers):
        assert np.array_equal(aligned.hosts(layer), new.hosts(layer))
    homes = (np.arange(new.physical_to_logical.shape[1]) % new.slots_per_rank) < new.homes_per_rank
    stays_LE = old.home_rank == new.home_rank
    assert np.array_equal(aligned.home[stays_LE], old.home[stays_LE])
    for layer, slot in zip(*np.nonzero(old.physical_to_logical != EMPTY), strict=True):
        expert, rank = old.physical_to_logical[layer, slot], slot // old.slots_per_rank
        if not homes[slot] and new.hosts(layer)[expert, rank] and new.home_rank[layer, expert] != rank:
            assert aligned.physical_to_logical[layer, slot] == expert


@settings(max_examples=60, deadline=None)
@given(pair=PAIRS, groups=st.integers(1, 3))
def test_alignment_moves_the_fewest_homes_that_any_relabelling_of_equal_ranks_moves(pair, groups):
    old, new = pair_of_plans((pair[0], pair[1], min(pair[2], 5), *pair[3:]))
    group_G = np.random.default_rng(pair[0]).integers(0, groups, new.num_ranks)
    aligned = align_plan(old, new, group_G)
    orders = [o for o in itertools.permutations(range(new.num_ranks)) if np.array_equal(group_G[list(o)], group_G)]
    for layer in range(new.num_layers):
        rows = new.physical_to_logical[layer].reshape(new.num_ranks, -1)
        as_sets = {tuple(sorted(map(tuple, np.sort(rows[group_G == g], axis=1).tolist()))) for g in range(groups)}
        aligned_rows = aligned.physical_to_logical[layer].reshape(new.num_ranks, -1)
        assert as_sets == {tuple(sorted(map(tuple, np.sort(aligned_rows[group_G == g], axis=1).tolist()))) for g in range(groups)}
        fewest = min(int((np.array(o)[new.home_rank[layer]] != old.home_rank[layer]).sum()) for o in orders)
        assert (aligned.home_rank[layer] != old.home_rank[layer]).sum() == fewest


def test_a_mere_relabelling_of_equal_ranks_moves_nothing_after_alignment():
    old = PlacementPlan.contiguous(2, 4, 8)
    swapped = np.repeat([1, 0, 3, 2], 2)
    new = PlacementPlan.from_hosts(np.tile(swapped, (2, 1)), np.tile(swapped[:, None] == np.arange(4), (2, 1, 1)), replica_slots_per_rank=1)
    assert moves(old, new).num_homes == 16
    aligned = align_plan(old, new, interchangeable_ranks(two_level_ports(2, 2)))
    assert moves(old, aligned).num_homes == 0
    assert aligned.slots_per_rank == 3


def test_ranks_are_interchangeable_within_a_node_if_their_ports_are_equal():
    assert np.unique(interchangeable_ranks(two_level_ports(2, 3)), return_counts=True)[1].tolist() == [3, 3]
    uneven = random_ports(np.random.default_rng(0), np.array([0, 0, 1, 1]))
    assert np.unique(interchangeable_ranks(uneven)).size == 4


def test_a_moved_expert_is_14_bytes_per_bf16_parameter():
    cost = CostModel(hidden_size=10, ffn_hidden_size=20, gated=True)
    assert state_bytes(cost) == 14 * 3 * 10 * 20
    old = PlacementPlan.contiguous(1, 2, 2, replica_slots_per_rank=1)
    new = PlacementPlan(np.array([[1, EMPTY, 0, 1]]), 2, 2)
    assert migration_bytes(moves(old, new), cost) == 2 * state_bytes(cost)  # the replica of 1 moves nothing


def test_rounds_are_timed_one_after_the_other_by_the_slowest_port():
    ports = two_level_ports(2, 2, scale_up_GBps=100.0, scale_out_GBps=10.0, latency_us=(1, 5))
    old = PlacementPlan.contiguous(3, 4, 4)
    home_rank = np.array([[1, 0, 2, 3], [2, 1, 0, 3], [0, 3, 2, 1]])  # layer 0: inside a node; layers 1 and 2: between the nodes
    new = PlacementPlan.from_hosts(home_rank, home_rank[:, :, None] == np.arange(4), replica_slots_per_rank=0)
    assert migration_us(moves(old, new), ports, 10**6) == pytest.approx((10 + 1) + 2 * (100 + 5))
    assert migration_us(moves(old, old), ports, 10**6) == 0


def test_plans_of_different_shape_are_refused():
    small, large = PlacementPlan.contiguous(1, 2, 4), PlacementPlan.contiguous(1, 2, 8)
    for function in (moves, align_plan, replicas_removed):
        with pytest.raises(ScaleMoEError, match="the new plan must be for"):
            function(small, large)
