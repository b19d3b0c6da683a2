"""Replicas: valid, judged by the split, and within the bars on a trace shaped like the recorded one."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replicas.add import add_replicas, judge_of, without_unpaid
from megatron_scalemoe.placement.replicas.construct import (
    balanced_homes,
    chained_replicas,
    copies_by_load,
    eplb_shaped,
    packed_replicas,
)
from megatron_scalemoe.placement.replicas.drift import plausible_loads
from megatron_scalemoe.placement.replicas.improve import Limits, draw_moves, improve, lower_bounds, moved
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.plan.split import balanced_max_load
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import LayerTraffic
from tests.placement.search_cases import clustered_problem

# Balance is what counts: slow experts, and replicas shared by many micro-batches.
COMPUTE_HEAVY = CostModel(gpu_TFLOPs=10.0, micro_batches=64)


def layer_problem(loads_SE, ranks, replicas, cost=COMPUTE_HEAVY, nodes=1):
    counts = np.broadcast_to(loads_SE.mean(axis=0) / ranks, (ranks, loads_SE.shape[1]))
    traffic = LayerTraffic(counts, None, loads_SE, topk=2)
    return LayerProblem(traffic=traffic, ports=two_level_ports(nodes, ranks // nodes), cost=cost, replicas=replicas)


def contiguous(experts, ranks):
    return np.repeat(np.arange(ranks), experts // ranks)


def solve(problem, homes=None, seed=0, effort=1.0, **options):
    if homes is None:
        homes = contiguous(problem.num_experts, problem.num_ranks)
    return add_replicas(problem, homes, rng=np.random.default_rng(seed), **{"budget": Budget(effort), **options})


def max_over_mean(load_E, hosts):
    return balanced_max_load(load_E[None], hosts)[0][0] / (load_E.sum() / hosts.shape[1])


def cost_of(problem, solution):
    return solution_cost(problem, solution).total_us


def check_valid(solution, replicas, per_rank):
    """By the rules of a plan: all homes, no expert twice on a rank, no more replicas than slots."""
    plan = PlacementPlan.from_hosts(solution.home_rank[None], solution.hosts[None], replica_slots_per_rank=per_rank)
    assert plan.num_replicas[0] <= replicas
    assert np.array_equal(plan.home_rank[0], solution.home_rank)


def skewed_loads(rng, steps, experts):
    popularity = rng.permutation(np.arange(1, experts + 1) ** -rng.uniform(0, 2))
    return rng.poisson(popularity / popularity.sum() * 5000, (steps, experts)).astype(float)


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, per_node, homes = draw(st.sampled_from([(1, 2, 1), (1, 4, 3), (2, 2, 2), (2, 4, 1), (3, 2, 2)]))
    ranks = nodes * per_node
    replicas = draw(st.integers(0, min(3 * ranks, homes * ranks * (ranks - 1))))
    cost = draw(st.sampled_from([COMPUTE_HEAVY, CostModel(), CostModel(hidden_size=256, ffn_hidden_size=256)]))
    return layer_problem(skewed_loads(rng, draw(st.integers(1, 4)), ranks * homes), ranks, replicas, cost, nodes)


@settings(max_examples=20, deadline=None)
@given(problems(), st.integers(0, 100), st.sampled_from(["move", "stay", "stay beside old replicas"]))
def test_any_result_is_a_valid_plan_that_costs_no_more_than_its_homes(problem, seed, homes_that):
    rng = np.random.default_rng(seed)
    homes = rng.permutation(contiguous(problem.num_experts, problem.num_ranks))
    limits = {"replicas": problem.replicas, "per_rank": problem.replica_slots_per_rank}
    old = chained_replicas(rng.random(homes.size), homes, problem.ports.node_of_rank, target=0.0, own_node=bool(seed % 2), **limits)
    check_valid(old, **limits)
    stay = homes_that != "move"
    solution = solve(problem, homes, seed, effort=0.2, fixed_homes=stay, old=old if "old" in homes_that else None)
    check_valid(solution, **limits)
    assert not stay or np.array_equal(solution.home_rank, homes)
    assert cost_of(problem, solution) <= cost_of(problem, Solution.without_replicas(homes, problem.num_ranks)) * (1 + 1e-9)


def test_the_same_seed_gives_the_same_replicas():
    problem = layer_problem(skewed_loads(np.random.default_rng(5), 3, 32), 16, 16)
    first, again = (solve(problem, seed=7, effort=0.2) for _ in range(2))
    assert np.array_equal(first.hosts, again.hosts)
    assert np.array_equal(first.home_rank, again.home_rank)


def test_a_deadline_in_the_past_still_gives_a_valid_plan_at_once():
    problem = layer_problem(skewed_loads(np.random.default_rng(6), 3, 256), 64, 64, nodes=8)
    start = time.monotonic()
    solution = solve(problem, budget=Budget(deadline=start - 1.0))
    assert time.monotonic() - start < 1.0
    check_valid(solution, 64, 1)


def test_without_tokens_or_replicas_the_homes_stay():
    homes = np.array([1, 0, 1, 0])
    for problem in (layer_problem(np.zeros((2, 4)), 2, 2), layer_problem(np.array([[9.0, 1, 1, 1]]), 2, 0)):
        solution = solve(problem, homes)
        assert np.array_equal(solution.home_rank, homes)
        assert solution.hosts.sum() == 4


def test_steps_without_tokens_at_the_end_of_the_record_are_borne():
    loads = np.zeros((8, 4))
    loads[0] = 900, 10, 10, 10
    assert max_over_mean(loads[0], solve(layer_problem(loads, 4, 4)).hosts) < 1.2


def test_a_replica_is_placed_only_where_it_pays():
    loads = np.array([[900.0, 30, 30, 30, 30, 30, 30, 30]])
    cheap, dear = CostModel(micro_batches=1000), CostModel(micro_batches=1)
    problems = (layer_problem(loads * tokens, 8, 8, cost) for cost in (cheap, dear) for tokens in (1, 100))
    paid = [int(solve(problem, effort=0.3).hosts.sum()) - 8 for problem in problems]
    # With few tokens in a step, sending an expert costs more than it saves.
    assert [number > 0 for number in paid] == [True, True, False, True]


@pytest.fixture
def needless():
    """A judge, and a solution where the replica of the hot expert pays, that of a cold one only costs."""
    problem = layer_problem(np.array([[90_000.0, 3000, 3000, 3000, 3000, 3000, 3000, 3000]]), 8, 8, CostModel(micro_batches=8))
    bare = Solution.without_replicas(contiguous(8, 8), 8)
    solution = Solution(bare.home_rank, bare.hosts.copy())
    solution.hosts[[0, 5], 1] = True
    return judge_of(problem, bare, problem.traffic.loads, np.ones(1)), solution


def test_a_replica_that_does_not_pay_is_dropped(needless):
    kept = without_unpaid(*needless, Budget())
    assert kept.hosts[[0, 5], 1].tolist() == [True, False]


def test_loads_to_come_have_a_price(needless):
    judge, solution = needless
    extra_us = judge.cost_us(solution, largest=80_000.0) - judge.cost_us(solution, largest=50_000.0)
    assert extra_us == pytest.approx(30_000 * judge.us_per_token)


def test_recorded_shape_is_balanced_to_6_percent_one_step_later_and_within_the_bars_of_an_old_plan_50_steps_later():
    loads = synthesize("recorded", layers=8, steps=56, seed=12).counts.sum(axis=2).astype(float)
    layers = (0, 1, 4, 7)
    plans = {layer: solve(layer_problem(loads[:1, layer], 16, 16, nodes=2)).hosts for layer in layers}

    def reached(*steps):
        return [max_over_mean(loads[step, layer], plans[layer]) for step in steps for layer in layers]

    assert np.mean(reached(1)) <= 1.06
    assert np.mean(reached(50, 55)) <= 1.30
    assert np.percentile(reached(50, 55), 95) <= 1.9


def test_recorded_shape_is_balanced_to_1_percent_one_step_later_with_twice_the_slots():
    loads = synthesize("recorded", layers=8, steps=25, seed=11).counts.sum(axis=2).astype(float)
    reached = [max_over_mean(loads[24, at], solve(layer_problem(loads[23:24, at], 16, 32, nodes=2)).hosts) for at in (0, 7)]
    assert np.mean(reached) <= 1.01


def eplb_hosts(load_E, ranks, replicas):
    """Hosts after EPLB's description: replicate by load per copy, pack heaviest first; it knows no homes."""
    copies = np.ones(load_E.size, dtype=int)
    for _ in range(replicas):
        copies[np.argmax(load_E / copies)] += 1
    items = sorted(((load_E[e] / copies[e], e) for e in range(load_E.size) for _ in range(copies[e])), reverse=True)
    hosts, weight, room = np.zeros((load_E.size, ranks), dtype=bool), [0.0] * ranks, [len(items) // ranks] * ranks
    for load, expert in items:
        rank = min((r for r in range(ranks) if room[r]), key=weight.__getitem__)
        hosts[expert, rank], room[rank] = True, room[rank] - 1
        weight[rank] += load
    return hosts


@pytest.mark.parametrize(("ranks", "experts", "replicas"), [(8, 16, 8), (8, 64, 8), (16, 32, 16), (16, 64, 32), (8, 8, 8)])
def test_never_less_balanced_than_eplb_when_balance_is_what_counts(ranks, experts, replicas):
    loads = skewed_loads(np.random.default_rng(8), 1, experts)
    ours = max_over_mean(loads[0], solve(layer_problem(loads, ranks, replicas)).hosts)
    assert ours <= max_over_mean(loads[0], eplb_hosts(loads[0], ranks, replicas)) * 1.005


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=12), st.booleans())
def test_with_one_expert_a_rank_a_chain_of_one_replica_a_rank_balances_exactly(load, own_node):
    load_E = np.array(load, dtype=float)
    ranks = load_E.size
    chained = chained_replicas(
        load_E, np.arange(ranks), np.arange(ranks) % 2, target=load_E.sum() / ranks, replicas=ranks - 1, per_rank=1, own_node=own_node
    )
    check_valid(chained, ranks - 1, 1)
    assert load_E.sum() == 0 or max_over_mean(load_E, chained.hosts) < 1 + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_packed_replicas_are_valid_for_any_loads_and_slots(seed):
    rng = np.random.default_rng(seed)
    ranks, homes, per_rank = (int(n) for n in rng.integers(1, (7, 4, 4)))
    replicas = int(rng.integers(0, min(per_rank * ranks, homes * ranks * (ranks - 1)) + 1))
    load_E = rng.integers(0, 100, ranks * homes) * (rng.random(ranks * homes) < 0.6)
    check_valid(packed_replicas(load_E.astype(float), ranks=ranks, replicas=replicas, per_rank=per_rank), replicas, per_rank)


def test_the_hottest_load_per_copy_gets_the_next_copy():
    # 12 -> 6 a copy, then 8 -> 4, then 6, 6 -> 4; by hand.
    assert copies_by_load(np.array([12.0, 8.0, 3.0, 1.0]), 3, 4).tolist() == [3, 2, 1, 1]
    assert copies_by_load(np.array([12.0, 1.0]), 5, 2).tolist() == [2, 2]
    assert copies_by_load(np.array([12.0, 1.0]), 5, 1).tolist() == [1, 1]


def test_balanced_homes_take_turns_by_load():
    assert balanced_homes(np.array([1.0, 8, 2, 4]), 2).tolist() == [0, 0, 1, 1]


def random_solution(rng, ranks, homes, per_rank):
    load_E = skewed_loads(rng, 1, ranks * homes)[0]
    return packed_replicas(load_E, ranks=ranks, replicas=ranks * per_rank - 1, per_rank=per_rank)


def all_cuts(ranks):
    return np.array([bits for bits in itertools.product([False, True], repeat=ranks) if any(bits)])


def test_bounds_of_moves_are_exact_with_all_cuts_and_never_too_high_with_some():
    rng = np.random.default_rng(9)
    for _ in range(10):
        solution, loads = random_solution(rng, 5, 2, 2), skewed_loads(rng, 4, 10)
        weights = rng.random(4)
        cuts = rng.random((4, 5)) < 0.5
        cuts[:, 0], cuts[:, 1] = True, False
        moves = draw_moves(solution, cuts, np.ones(4), 60, Limits(10, 2), rng=rng)
        assert len(moves) > 5
        exact = np.array([weights @ balanced_max_load(loads, moved(solution, move).hosts)[0] for move in moves])
        assert np.allclose(lower_bounds(solution, moves, all_cuts(5), loads, weights), exact, rtol=1e-5)
        assert (lower_bounds(solution, moves, all_cuts(5)[::3], loads, weights) <= exact * (1 + 1e-5)).all()


def test_moves_keep_a_placement_valid_and_are_of_every_kind():
    rng = np.random.default_rng(10)
    kinds = set()
    for _ in range(30):
        solution = random_solution(rng, 4, 2, 2)
        cuts = np.array([[True, True, False, False]])
        for move in draw_moves(solution, cuts, np.ones(1), 40, Limits(8, 2), rng=rng):
            after = moved(solution, move)
            check_valid(after, 8, 2)
            change = int(after.hosts.sum()) - int(solution.hosts.sum())
            kinds.add((bool((after.home_rank != solution.home_rank).any()), bool(move[1] == 4), bool(move[3] == 8), change))
            assert (after.hosts != solution.hosts).any()
    swap_homes, swap_copies, move_copy = (True, False, False, 0), (False, False, False, 0), (False, False, True, 0)
    replace, add = (False, True, False, 0), (False, True, True, 1)
    assert kinds == {swap_homes, swap_copies, move_copy, replace, add}


def test_no_replica_is_added_beyond_the_number_allowed():
    rng = np.random.default_rng(13)
    solution = random_solution(rng, 4, 2, 2)
    cuts = np.array([[True, False, True, False]])
    allowed = int(solution.hosts.sum()) - 8
    for move in draw_moves(solution, cuts, np.ones(1), 200, Limits(allowed, 2), rng=rng):
        assert moved(solution, move).hosts.sum() <= solution.hosts.sum()


def test_improvement_lowers_the_mean_largest_load_or_leaves_the_start():
    rng = np.random.default_rng(14)
    gains = []
    for _ in range(8):
        loads, weights = skewed_loads(rng, 3, 16), np.full(3, 1 / 3)
        start = Solution.without_replicas(contiguous(16, 8), 8)
        better = improve(start, loads, weights, lambda _, largest: largest, Limits(8, 1), draws=30, rng=rng, budget=Budget())
        check_valid(better, 8, 1)
        before, after = (weights @ balanced_max_load(loads, solution.hosts)[0] for solution in (start, better))
        gains.append(after / before)
    assert max(gains) <= 1
    assert np.mean(gains) < 0.7


def test_plausible_loads_hold_recorded_steps_and_drift_of_the_recorded_size():
    rng = np.random.default_rng(15)
    loads = np.exp(rng.normal(0, 0.1, (10, 400))) * 1000
    cases, weights = plausible_loads(loads, 300, rng)
    assert cases.shape == (300, 400)
    assert np.isclose(weights.sum(), 1)
    assert np.isclose(weights[:10].sum(), 0.5)
    assert np.allclose(cases.sum(axis=1), loads.sum() / 10)
    assert np.allclose(cases[:10] / cases[:10].sum(axis=1, keepdims=True), (loads / loads.sum(axis=1, keepdims=True))[::-1])
    # Steps differ by sqrt(2) x 0.1; drawn loads by one to three times that.
    spread = np.log(cases[10:] / loads.mean(axis=0)).std(axis=1)
    assert 0.12 < spread.min() < 0.17
    assert 0.36 < spread.max() < 0.5


@pytest.mark.parametrize("steps", [1, 7, 51])
def test_of_many_recorded_steps_some_are_taken_evenly_the_last_among_them(steps):
    loads = np.eye(60)[:steps] + 1
    cases, weights = plausible_loads(loads, 12, np.random.default_rng(0))
    taken = [int(np.flatnonzero(np.isclose(case / case.min(), 2))[0]) for case in cases[: min(steps, 6)]]
    assert taken[0] == steps - 1
    assert len(set(taken)) == len(taken)
    assert len(taken) == 1 or np.ptp(np.diff(taken)) <= 1
    assert np.isclose(weights.sum(), 1)


def test_moves_beside_fixed_homes_change_replicas_only():
    rng = np.random.default_rng(16)
    changed = 0
    for _ in range(30):
        solution = random_solution(rng, 4, 2, 2)
        for move in draw_moves(solution, np.eye(4, dtype=bool), np.ones(4), 40, Limits(8, 2, fixed_homes=True), rng=rng):
            after = moved(solution, move)
            check_valid(after, 8, 2)
            assert np.array_equal(after.home_rank, solution.home_rank)
            changed += bool((after.hosts != solution.hosts).any())
    assert changed > 100


def test_replicas_alone_even_out_bad_homes():
    """Hot experts all on one rank: replicas alone must even that out."""
    loads = np.full((1, 32), 10.0)
    loads[0, :4] = 400
    problem = layer_problem(loads, 8, 16, nodes=2)
    solution = solve(problem, fixed_homes=True)
    assert max_over_mean(loads[0], solution.hosts) < 1.02
    bare = Solution.without_replicas(contiguous(32, 8), 8)
    assert max_over_mean(loads[0], bare.hosts) > 6


def test_eplbs_shape_keeps_replicas_in_the_node_of_their_expert_and_evens_out_a_hot_one():
    problem = clustered_problem(3, nodes=2, ranks_per_node=4, experts=16, replicas=16)
    problem.traffic.counts[:, 0] = problem.traffic.counts.sum() / 32
    solution = eplb_shaped(problem)
    check_valid(solution, 16, 2)
    assert all(len({*problem.ports.node_of_rank[ranks]}) == 1 for ranks in solution.hosts)
    per_copy_E = problem.load / solution.hosts.sum(axis=1)
    with_replicas, alone = per_copy_E @ solution.hosts, np.bincount(solution.home_rank, problem.load)
    assert with_replicas.max() < 0.6 * alone.max()
    assert solution.hosts[0].sum() > solution.hosts[1:].sum(axis=1).max()
