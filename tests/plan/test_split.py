"""The per-step split against linear programming."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import balanced_max_load, balanced_shares, even_shares, split_tokens

ONE_NODE = np.zeros(8, dtype=int)


def random_slots(rng, ranks, homes, extra, replicas):
    slots = np.full((ranks, homes + extra), EMPTY)
    slots[:, :homes] = rng.permutation(ranks * homes).reshape(ranks, homes)
    for _ in range(replicas if extra else 0):
        expert, rank = min(int(rng.zipf(1.5)) - 1, ranks * homes - 1), rng.integers(ranks)
        free = np.flatnonzero(slots[rank] == EMPTY)
        if free.size and expert not in slots[rank]:
            slots[rank, free[0]] = expert
    return slots.reshape(-1)


def random_case(rng):
    """Counts, slots, ranks, node of each rank."""
    ranks, homes = int(rng.integers(1, 9)), int(rng.integers(1, 4))
    slots = random_slots(rng, ranks, homes, int(rng.integers(0, 3)), int(rng.integers(0, 3 * ranks)))
    weights = rng.permutation(np.arange(1, ranks * homes + 1) ** -rng.uniform(0, 2.5))
    counts = rng.poisson(weights / weights.sum() * rng.integers(1, 3000), (ranks, ranks * homes))
    counts[:, rng.random(ranks * homes) < 0.2] = 0
    nodes = np.unique(rng.integers(0, 3, ranks), return_inverse=True)[1]
    return counts, slots, ranks, nodes


def hosts_of(slots, ranks, experts):
    hosts = np.zeros((experts, ranks), dtype=bool)
    used = np.flatnonzero(slots != EMPTY)
    hosts[slots[used], used // (slots.size // ranks)] = True
    return hosts


def lp_max_load(load, hosts):
    """The smallest possible largest rank load, by linear programming: one variable per copy, and the bound."""
    expert, rank = np.nonzero(hosts)
    copies = np.arange(expert.size)
    below = np.zeros((hosts.shape[1], copies.size + 1))
    below[rank, copies], below[:, -1] = 1, -1
    whole = np.zeros((hosts.shape[0], copies.size + 1))
    whole[expert, copies] = 1
    goal = np.append(np.zeros(copies.size), 1)
    return linprog(goal, A_ub=below, b_ub=np.zeros(len(below)), A_eq=whole, b_eq=load).fun


def rank_loads(tokens, ranks):
    return tokens.sum(axis=0).reshape(ranks, -1).sum(axis=1)


def test_the_largest_rank_load_is_the_lp_optimum_in_whole_tokens_on_random_cases():
    rng = np.random.default_rng(0)
    replicated = 0
    for _ in range(120):
        counts, slots, ranks, nodes = random_case(rng)
        hosts = hosts_of(slots, ranks, counts.shape[1])
        optimum = lp_max_load(counts.sum(axis=0), hosts)
        assert rank_loads(split_tokens(counts, slots, ranks, nodes), ranks).max() <= np.ceil(optimum - 1e-6)
        replicated += (hosts.sum(axis=1) > 1).any()
    assert replicated > 50


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_every_token_goes_once_to_a_slot_of_its_expert(seed, even):
    counts, slots, ranks, nodes = random_case(np.random.default_rng(seed))
    tokens = split_tokens(counts, slots, ranks, nodes, even=even)
    assert tokens.dtype == np.int64
    assert tokens.min() >= 0
    assert not tokens[:, slots == EMPTY].any()
    assert np.array_equal(tokens[:, slots != EMPTY] @ np.eye(counts.shape[1], dtype=int)[slots[slots != EMPTY]], counts)


def test_the_even_split_gives_each_copy_the_same_to_one_token():
    rng = np.random.default_rng(2)
    for _ in range(50):
        counts, slots, ranks, nodes = random_case(rng)
        per_slot = split_tokens(counts, slots, ranks, nodes, even=True).sum(axis=0)
        for expert in range(counts.shape[1]):
            copies = per_slot[slots == expert]
            assert copies.max() - copies.min() <= 1


def test_balanced_traffic_stays_on_its_own_rank():
    slots = np.array([0, 1, 1, 0])
    counts = np.array([[40, 60], [50, 50]])
    assert np.array_equal(split_tokens(counts, slots, 2, np.array([0, 1])), [[40, 60, 0, 0], [0, 0, 50, 50]])


def test_tokens_without_a_copy_on_their_rank_stay_in_their_node():
    slots = np.array([0, 1, 2, 0, 3, 4, 5, EMPTY])  # expert 0 on rank 0 (node 0) and rank 1 (node 1)
    counts = np.zeros((4, 8), dtype=int)
    counts[2, 0], counts[3, 0] = 30, 30
    tokens = split_tokens(counts, slots, 4, np.array([0, 1, 0, 1]))
    assert tokens[2, 0] == 30
    assert tokens[3, 3] == 30


def test_only_the_excess_leaves_an_overloaded_rank():
    slots = np.array([0, 1, 1, 0])
    counts = np.array([[80, 60], [10, 10]])  # local first: 140 and 20; the mean is 80
    tokens = split_tokens(counts, slots, 2, np.array([0, 1]))
    assert rank_loads(tokens, 2).tolist() == [80, 80]
    assert tokens[0, 2:].sum() == 60
    assert tokens[1, :2].sum() == 0


def test_replicas_of_different_experts_pass_load_along_a_chain():
    ranks = 8
    slots = np.stack([np.arange(ranks), (np.arange(ranks) - 1) % ranks], axis=1)
    slots[0, 1] = EMPTY  # rank r holds the experts r and r - 1: a chain from rank 0 to rank 7
    counts = np.full((ranks, ranks), 10)
    counts[:, 0] = 12  # 96 tokens of expert 0 and 80 of each other: 82 for each rank, if all pass some on
    assert rank_loads(split_tokens(counts, slots.reshape(-1), ranks, ONE_NODE), ranks).tolist() == [82] * ranks
    counts[:, 0] = 90  # 720 of expert 0, on two ranks
    assert rank_loads(split_tokens(counts, slots.reshape(-1), ranks, ONE_NODE), ranks).max() == 360


def test_the_layout_and_type_of_the_counts_do_not_matter():
    counts, slots, ranks, nodes = random_case(np.random.default_rng(12))
    expected = split_tokens(counts, slots, ranks, nodes)
    for other in (np.asfortranarray(counts), counts.astype(np.int32), counts.astype(np.uint16)):
        assert np.array_equal(split_tokens(other, slots.astype(np.int32), ranks, list(nodes)), expected)


@pytest.mark.parametrize("even", [False, True])
def test_degenerate_cases(even):
    zero = split_tokens(np.zeros((2, 2), dtype=int), np.array([0, 1, 1, 0]), 2, np.array([0, 0]), even=even)
    assert not zero.any()
    one_rank = split_tokens(np.array([[3, 4]]), np.array([1, EMPTY, 0]), 1, np.array([0]), even=even)
    assert one_rank.tolist() == [[4, 0, 3]]
    everywhere = split_tokens(np.array([[9, 0, 0]] * 3), np.tile([0, 1, 2], 3), 3, np.arange(3), even=even)
    assert rank_loads(everywhere, 3).tolist() == [9, 9, 9]
    no_replicas = split_tokens(np.array([[5, 7], [1, 2]]), np.array([1, 0]), 2, np.array([0, 1]), even=even)
    assert no_replicas.tolist() == [[7, 5], [2, 1]]


def test_counts_near_the_limit_are_split_exactly():
    slots = np.array([0, 1, 2, 0])
    counts = np.array([[2**29, 10], [2**29 - 100, 20]])
    counts = np.pad(counts, ((0, 0), (0, 1)))
    assert np.ptp(rank_loads(split_tokens(counts, slots, 2, np.array([0, 1])), 2)) <= 1


@pytest.mark.parametrize(
    ("counts", "slots", "message"),
    [
        (np.ones((2, 2)), [0, 1], "counts must be integers"),
        (np.ones((3, 2), dtype=int), [0, 1], "ranks = 2"),
        (np.ones((2, 2), dtype=int), [0, 1, 1], "multiple of the 2 ranks"),
        (np.ones((2, 2), dtype=int), [0, 2], "experts below 2"),
        (np.array([[1, 1], [1, -1]]), [0, 1], "0 or more"),
        (np.array([[2**30, 1], [1, 1]]), [0, 1], "2\\^30"),
        (np.ones((2, 2), dtype=int), [0, EMPTY], "no slot for expert 1"),
    ],
)
def test_input_that_does_not_fit_is_refused(counts, slots, message):
    with pytest.raises(ScaleMoEError, match=message):
        split_tokens(counts, np.array(slots), 2, np.array([0, 0]))


def test_float_loads_are_balanced_as_by_linear_programming():
    rng = np.random.default_rng(3)
    for _ in range(50):
        counts, slots, ranks, _ = random_case(rng)
        hosts = hosts_of(slots, ranks, counts.shape[1])
        loads = np.stack([rng.random(counts.shape[1]) ** 4, counts.sum(axis=0) * 0.37, np.zeros(counts.shape[1])])
        optimum = np.array([lp_max_load(load, hosts) for load in loads])
        largest, cuts = balanced_max_load(loads, hosts)
        assert np.allclose(largest, optimum, rtol=1e-5, atol=1e-9)
        trapped = hosts @ ~cuts.T == 0  # [E, B]: all hosts of the expert are in the cut
        assert np.allclose((loads.T * trapped).sum(axis=0) / cuts.sum(axis=1), largest, rtol=1e-5, atol=1e-9)
        for load, best in zip(loads, optimum, strict=True):
            share = balanced_shares(load, hosts)
            assert np.allclose(share.sum(axis=1), 1)
            assert not share[~hosts].any()
            assert (load @ share).max() <= best * (1 + 1e-5) + 1e-9


def test_even_shares_divide_each_expert_by_its_hosts():
    assert even_shares(np.array([[True, True], [False, True]])).tolist() == [[0.5, 0.5], [0.0, 1.0]]


def test_64_ranks_with_256_experts_and_64_replicas_are_split_in_milliseconds():
    rng = np.random.default_rng(4)
    slots = random_slots(rng, 64, 4, 1, 400)
    popularity = np.arange(1, 257) ** -0.8
    counts = rng.poisson(popularity / popularity.sum() * 32768, (64, 256))
    seconds = []
    for _ in range(20):
        start = time.process_time()
        split_tokens(counts, slots, 64, np.arange(64) // 8)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.004  # 1 ms alone on the machine; the bar is 2
