import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.placement.bound import TIGHT, gap_to, lower_bound_us
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us, placement_cost, solution_cost
from megatron_scalemoe.placement.problem import LayerProblem, Solution
from megatron_scalemoe.placement.solvers.baselines import solve_greedy
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.synthetic import synthesize
from tests.placement.tiny import all_homes, least_cost_us, random_problem

ROUNDING = 1 + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from(((4, 2), (6, 2), (6, 3), (3, 3), (4, 4))), topk=st.integers(1, 3), data=st.data())
def test_no_placement_beats_the_bound(seed, shape, topk, data):
    experts, ranks = shape
    overlap, deduplicate, together = data.draw(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans()))
    problem = random_problem(
        seed, ranks=ranks, experts=experts, topk=topk, together=together, overlap=overlap, deduplicate=deduplicate, exchange_overhead_us=2.0
    )
    assert 0 < lower_bound_us(problem) <= least_cost_us(problem) * ROUNDING


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), topk=st.integers(1, 3), replicas=st.integers(1, 4), together=st.booleans(), price=st.booleans())
def test_no_replicas_and_no_split_beat_the_bound(seed, topk, replicas, together, price):
    problem = random_problem(
        seed, ranks=2, experts=4, topk=topk, together=together, replicas=replicas, ffn_hidden_size=1, micro_batches=1 if price else 10**6
    )
    bound, rng = lower_bound_us(problem), np.random.default_rng(seed)
    for home_rank_E in all_homes(4, 2):
        for copied in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in range(replicas + 1)):
            hosts_EG = home_rank_E[:, None] == np.arange(2)
            hosts_EG[list(copied)] = True
            if hosts_EG.sum(axis=0).max() > problem.homes_per_rank + problem.replica_slots_per_rank:
                continue
            price_us = replica_us(home_rank_E, hosts_EG, problem.cost, problem.ports)
            for first in (0.5, rng.random()):
                share_EG = np.where(hosts_EG.all(axis=1)[:, None], [first, 1 - first], hosts_EG)
                assert bound <= (placement_cost(problem, share_EG).total_us + price_us) * ROUNDING
            # Sources that each prefer their own copy pay less than if all did alike.
            assert bound <= solution_cost(problem, Solution(home_rank_E, hosts_EG)).total_us * ROUNDING


def layer(kind="clustered", *, topk=1, **cost) -> LayerProblem:
    trace = synthesize(kind, ranks=8, experts=64, layers=1, topk=topk, steps=2, tokens_per_rank=1024, seed=0)
    return LayerProblem(traffic=trace.layer(0), ports=two_level_ports(2, 4), cost=CostModel(**cost))


@pytest.mark.parametrize(("topk", "deduplicate"), [(1, True), (2, False)])
def test_64_experts_on_8_ranks_are_bounded_tightly_where_no_rows_are_shared(topk, deduplicate):
    problem = layer(topk=topk, deduplicate=deduplicate)
    cost_us = home_cost_us(problem, solve_greedy(problem, rng=np.random.default_rng(0), budget=Budget()))
    assert lower_bound_us(problem) <= cost_us <= lower_bound_us(problem) * 1.15


def test_a_hot_expert_bounds_the_load_by_its_copies():
    problem = random_problem(0, ranks=4, experts=8, topk=1)
    counts = np.ones((4, 8))
    counts[:, 3] = 1000
    alone = dataclasses.replace(problem, traffic=dataclasses.replace(problem.traffic, counts=counts))
    copied = dataclasses.replace(alone, replicas=1)
    compute_us = problem.cost.compute_us_per_row
    assert lower_bound_us(alone) >= (4000 + 4) * compute_us
    assert 2000 * compute_us <= lower_bound_us(copied) < lower_bound_us(alone)


def test_a_slow_port_and_a_heavy_load_each_raise_the_bound():
    problem = layer(gpu_TFLOPs=4000.0)
    slow = problem.ports.into._replace(scale_out_GBps=problem.ports.into.scale_out_GBps / 10)
    slower = dataclasses.replace(problem, ports=dataclasses.replace(problem.ports, into=slow))
    assert lower_bound_us(slower) > 2 * lower_bound_us(problem)
    assert lower_bound_us(layer(gpu_TFLOPs=4.0)) > 10 * lower_bound_us(problem)


def test_a_gap_is_told_where_it_is_tight_only():
    assert gap_to(100.0, 104.0) == pytest.approx(0.04)
    assert gap_to(100.0, 100.0 * (1 + 1.01 * TIGHT)) is None
    assert gap_to(None, 5.0) is None
    assert gap_to(1e-9, 1e-9) == 0.0
