"""Lower bounds against all placements of tiny layers, and on realistic ones."""

import dataclasses
import itertools
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.exchange import exchange_phases
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.bound import least_largest_load, lower_bound_us
from megatron_scalemoe.placement.objective import home_cost_us, placement_cost, solution_cost
from megatron_scalemoe.placement.partners import find_partners
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.replica_bounds import least_copy_load
from megatron_scalemoe.placement.solvers.baselines import solve_greedy
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.matrices import distinct_factor
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps
from tests.placement.tiny import all_homes, least_cost_us, random_problem

SHAPES = ((4, 2), (6, 2), (6, 3), (3, 3), (4, 4))
ROUNDING = 1 + 1e-9


@settings(max_examples=35, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES), topk=st.integers(1, 3), data=st.data())
def test_no_placement_beats_either_bound(seed, shape, topk, data):
    experts, ranks = shape
    overlap, deduplicate, together = data.draw(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans()))
    problem = random_problem(
        seed, ranks=ranks, experts=experts, topk=topk, together=together, overlap=overlap, deduplicate=deduplicate, exchange_overhead_us=2.0
    )
    combinatorial, lp = (lower_bound_us(problem, method=method) for method in ("combinatorial", "lp"))
    assert 0 < combinatorial <= lp <= least_cost_us(problem) * ROUNDING


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), topk=st.integers(1, 3), replicas=st.integers(1, 4), together=st.booleans(), price=st.booleans())
def test_no_replicas_and_no_split_beat_the_bound(seed, topk, replicas, together, price):
    problem = random_problem(
        seed, ranks=2, experts=4, topk=topk, together=together, replicas=replicas, ffn_hidden_size=1, micro_batches=1 if price else 10**6
    )
    bound = max(lower_bound_us(problem, method=method) for method in ("combinatorial", "lp"))
    rng = np.random.default_rng(seed)
    for home_rank_E in all_homes(4, 2):
        for copied in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(replicas + 1)):
            hosts_EG = home_rank_E[:, None] == np.arange(2)
            hosts_EG[list(copied)] = True
            per_rank = hosts_EG.sum(axis=0)
            if per_rank.max() > problem.homes_per_rank + problem.replica_slots_per_rank:
                continue
            price_us = replica_us(home_rank_E, hosts_EG, problem.cost, problem.ports)
            for first in (0.5, rng.random()):
                share_EG = np.where(hosts_EG.all(axis=1)[:, None], [first, 1 - first], hosts_EG)
                assert bound <= (placement_cost(problem, share_EG).total_us + price_us) * ROUNDING
            # Sources that each prefer their own copy pay less than if all did alike.
            assert bound <= solution_cost(problem, Solution(home_rank_E, hosts_EG)).total_us * ROUNDING


def test_copies_of_everything_everywhere_leave_nothing_to_travel():
    problem = random_problem(1, ranks=4, experts=4, topk=2, replicas=12, micro_batches=10**9)
    everywhere = Solution(np.arange(4), np.ones((4, 4), dtype=bool))
    assert solution_cost(problem, everywhere).dispatch_us == 0
    assert lower_bound_us(problem) <= solution_cost(problem, everywhere).total_us


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), topk=st.integers(1, 3), exchange=st.sampled_from(["1dh", "2dh"]), together=st.booleans())
def test_hierarchical_exchanges_do_not_beat_their_bound(seed, topk, exchange, together):
    """The true phases, priced at the ports of the nodes alone."""
    problem = random_problem(seed, ranks=4, experts=4, topk=topk, together=together, exchange=exchange)
    into, out = problem.ports.into._replace(node_GBps=np.full(2, 9.0)), problem.ports.out._replace(node_GBps=np.full(2, 7.0))
    ports = dataclasses.replace(problem.ports, node_of_rank=np.array([0, 0, 1, 1]), into=into, out=out)
    problem = dataclasses.replace(problem, ports=ports)
    bound, row_bytes = lower_bound_us(problem), problem.cost.row_bytes
    in_node_GN = np.eye(2)[ports.node_of_rank]
    for home_rank_E in all_homes(4, 4):
        share_EG = np.eye(4)[home_rank_E]
        selections_GG = problem.traffic.counts @ share_EG
        bytes_GG = selections_GG * distinct_factor(share_EG, problem.traffic) * row_bytes
        bytes_GN = selections_GG @ in_node_GN * distinct_factor(share_EG @ in_node_GN, problem.traffic) * row_bytes
        crossing = np.zeros((2, 2))
        for phase_GG in exchange_phases(bytes_GG, ports.node_of_rank, exchange, bytes_GN if exchange == "2dh" else None):
            crossing += in_node_GN.T @ phase_GG @ in_node_GN * (1 - np.eye(2))
        busiest = [max((c.sum(axis=0) / 9.0).max(), (c.sum(axis=1) / 7.0).max()) for c in (crossing, crossing.T)]
        compute_us = selections_GG.sum(axis=0).max() * problem.cost.compute_us_per_row
        assert bound <= (2 * sum(busiest) / BYTES_PER_US_PER_GBps + compute_us) * ROUNDING
        assert bound <= home_cost_us(problem, home_rank_E) * ROUNDING


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(3, 7), slots=st.integers(2, 4))
def test_a_group_has_no_more_pairs_than_its_partners_bound(seed, experts, slots):
    rng = np.random.default_rng(seed)
    pairs_EE = rng.exponential(1.0, (experts, experts)) * (rng.random((experts, experts)) < 0.7)
    load_E = rng.exponential(1.0, experts)
    partners = find_partners(pairs_EE, load_E, slots, fractional=False, priced=True)
    for group in itertools.combinations(range(experts), min(slots, experts)):
        inside = pairs_EE[np.ix_(group, group)].sum() - pairs_EE[group, group].sum()
        for limit in (np.inf, load_E[list(group)].sum()):
            assert inside <= partners.most(limit)[list(group)].sum() * ROUNDING + 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(SHAPES))
def test_the_least_largest_load_is_never_above_the_truth(seed, shape):
    problem = random_problem(seed, ranks=shape[1], experts=shape[0], topk=1)
    truth = min(np.bincount(home, problem.load, shape[1]).max() for home in all_homes(*shape))
    assert problem.load.sum() / shape[1] * (1 - 1e-9) <= least_largest_load(problem) <= truth * ROUNDING


def test_replicas_of_one_hot_expert_bound_the_load_by_its_copies():
    problem = random_problem(0, ranks=4, experts=8, topk=1)
    counts = np.ones((4, 8))
    counts[:, 3] = 1000
    problem = dataclasses.replace(problem, traffic=dataclasses.replace(problem.traffic, counts=counts), replicas=1)
    assert least_copy_load(problem) == pytest.approx(2000)


def realistic(kind: str, *, nodes: int, per_node: int, experts: int, topk: int, seed: int = 0, **cost) -> LayerProblem:
    ranks = nodes * per_node
    trace = synthesize(kind, ranks=ranks, experts=experts, layers=1, topk=topk, steps=2, tokens_per_rank=1024, seed=seed)
    return LayerProblem(traffic=trace.layer(0), ports=two_level_ports(nodes, per_node), cost=CostModel(**cost))


@pytest.mark.parametrize(("topk", "deduplicate", "within"), [(1, True, 0.15), (2, False, 0.15), (2, True, 0.30)])
def test_64_experts_on_8_ranks_are_bounded_tightly(topk, deduplicate, within, capsys):
    problem = realistic("clustered", nodes=2, per_node=4, experts=64, topk=topk, deduplicate=deduplicate)
    cost_us = home_cost_us(problem, solve_greedy(problem, rng=np.random.default_rng(0), deadline=np.inf))
    bound_us = lower_bound_us(problem)
    with capsys.disabled():
        print(f"\n64 x 8, top-{topk}, deduplicate {deduplicate}: greedy {cost_us:.0f} us, bound {bound_us:.0f} us", end="")
    assert bound_us <= cost_us <= bound_us * (1 + within)


def test_a_thousand_ranks_are_bounded_at_once():
    problem = realistic("zipf", nodes=128, per_node=8, experts=1024, topk=8)
    start = time.process_time()
    bound_us = lower_bound_us(problem)
    assert time.process_time() - start < 2.0
    cost_us = home_cost_us(problem, np.arange(1024))
    assert 0.5 * cost_us < bound_us <= cost_us


def test_a_slow_node_raises_the_lp_above_the_closed_form():
    problem = realistic("zipf", nodes=2, per_node=4, experts=64, topk=1, gpu_TFLOPs=4000.0)
    into = problem.ports.into
    slow = into._replace(scale_out_GBps=into.scale_out_GBps * np.repeat([0.1, 1.0], 4))
    problem = dataclasses.replace(problem, ports=dataclasses.replace(problem.ports, into=slow))
    assert lower_bound_us(problem, method="lp") > 1.001 * lower_bound_us(problem, method="combinatorial")


def test_an_unknown_method_is_refused():
    with pytest.raises(ScaleMoEError, match="combinatorial, lp"):
        lower_bound_us(random_problem(0, ranks=2, experts=4, topk=1), method="sdp")


def test_bounds_end_where_mean_counts_are_rounded():
    """On one node nothing comes from others, but sums of mean counts in another order may differ by less than nothing."""
    trace = synthesize("zipf", ranks=8, experts=64, layers=1, steps=5, seed=3, coactivation=False)
    traffic = trace.layer(0)
    assert (traffic.counts.sum(axis=0) < np.ones((1, 8)) @ traffic.counts).any(), "the case is not one"
    problem = LayerProblem(traffic=traffic, ports=two_level_ports(1, 8), cost=CostModel())
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    try:
        assert lower_bound_us(problem) > 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
