import dataclasses
import time

import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.objective import home_cost_us, solution_cost
from megatron_scalemoe.placement.solve import BASELINES, SOLVERS, solve_layer, solve_trace
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.synthetic import synthesize
from tests.placement.search_cases import assert_balanced, clustered_problem

PORTS = two_level_ports(2, 2)
TRACE = synthesize("clustered", ranks=4, experts=16, layers=3, topk=2, steps=4, tokens_per_rank=500, seed=3)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "exact"])
@pytest.mark.parametrize("replicas", [0, 4])
def test_every_solver_gives_a_valid_solution_between_bound_and_contiguous(solver, replicas):
    problem = clustered_problem(1, nodes=2, ranks_per_node=2, experts=16, replicas=replicas)
    result = solve_layer(problem, solver, seed=1, effort=0.1)
    assert_balanced(problem, result.solution.home_rank)
    slots = problem.replica_slots_per_rank
    plan = PlacementPlan.from_hosts(result.solution.home_rank[None], result.solution.hosts[None], replica_slots_per_rank=slots)
    assert plan.num_replicas[0] <= replicas
    contiguous_us = solve_layer(problem, "contiguous").cost_us
    assert solver in BASELINES or result.cost_us <= contiguous_us
    assert result.cost_us == pytest.approx(solution_cost(problem, result.solution).total_us, rel=1e-12)
    assert result.gap is None or 0 <= result.gap == pytest.approx(result.cost_us / result.lower_bound_us - 1)
    assert result.history[0] == (0.0, pytest.approx(contiguous_us))
    assert result.history[-1] == (result.seconds, result.cost_us)


def test_without_replicas_the_cost_is_that_of_the_homes():
    problem = clustered_problem(3)
    result = solve_layer(problem, "greedy")
    assert result.cost_us == home_cost_us(problem, result.solution.home_rank)


def test_contiguous_and_random_leave_their_replica_slots_empty():
    result = solve_trace(TRACE, PORTS, CostModel(), solver="contiguous", replicas=4)
    assert result.plan.content_hash == PlacementPlan.contiguous(3, 4, 16, replica_slots_per_rank=1).content_hash
    assert solve_trace(TRACE, PORTS, CostModel(), solver="random", replicas=4).plan.num_replicas.tolist() == [0, 0, 0]


def test_a_trace_gives_a_plan_that_says_where_it_comes_from():
    done = []
    result = solve_trace(TRACE, PORTS, CostModel(), seed=5, effort=0.2, progress=lambda *at: done.append(at))
    assert (result.plan.num_layers, result.plan.num_ranks, len(result.layers)) == (3, 4, 3)
    wanted = {"solver": "local_search", "seed": 5, "trace_hash": TRACE.content_hash, "steps": [0, 4, 1], "shared": False}
    assert wanted.items() <= result.plan.provenance.items()
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert result.cost_us == sum(layer.cost_us for layer in result.layers)
    assert not result.cut
    contiguous = solve_trace(TRACE, PORTS, CostModel(), solver="contiguous")
    assert result.cost_us < contiguous.cost_us


def test_the_plan_depends_on_the_seed_only_not_on_processes_and_time():
    def plan(solver, seed, processes, **others):
        arguments = {"solver": solver, "seed": seed, "processes": processes, "replicas": 4, "effort": 0.1}
        return solve_trace(TRACE, PORTS, CostModel(), **arguments, **others).plan.content_hash

    assert plan("local_search", 1, 2) == plan("local_search", 1, 1, time_budget_s=600)
    assert plan("random", 1, 2) == plan("random", 1, 1) != plan("random", 2, 1)


def test_a_shared_placement_is_one_for_all_layers_judged_by_each():
    result = solve_trace(TRACE, PORTS, CostModel(), shared=True, effort=0.1)
    assert (result.plan.physical_to_logical == result.plan.physical_to_logical[0]).all()
    assert len({layer.cost_us for layer in result.layers}) == 3


def test_only_the_chosen_steps_count():
    counts = TRACE.counts.copy()
    counts[0] = np.roll(counts[0], 5, axis=-1)
    changed = dataclasses.replace(TRACE, counts=counts)
    costs = [
        solve_trace(t, PORTS, CostModel(), solver="greedy", steps=s).cost_us
        for t, s in ((TRACE, slice(1, None)), (changed, slice(1, None)), (changed, slice(None)))
    ]
    assert costs[0] == costs[1] != costs[2]


def test_a_plan_that_the_time_cut_says_so_and_is_in_time():
    began = time.monotonic()
    result = solve_trace(TRACE, PORTS, CostModel(), time_budget_s=0.2, replicas=8, effort=1000.0)
    assert result.seconds <= time.monotonic() - began < 3.0
    assert result.cut
    assert result.cost_us <= solve_trace(TRACE, PORTS, CostModel(), solver="contiguous").cost_us


def test_a_bound_that_tells_nothing_is_not_told():
    loose = solve_trace(TRACE, PORTS, CostModel(), effort=0.1)
    assert loose.lower_bound_us is None and loose.gap is None
    tight = solve_trace(TRACE, PORTS, CostModel(deduplicate=False, gpu_TFLOPs=0.1), effort=0.1)
    assert 0 <= tight.gap == tight.cost_us / tight.lower_bound_us - 1 < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "magic"}, "no such solver\n  found: 'magic'\n  try:   contiguous, random"),
        ({"steps": slice(9, None)}, "at least one recorded step"),
        ({"time_budget_s": 0.0}, "time budget must be above 0"),
        ({"replicas": 1000}, "replicas must be from 0 to"),
    ],
)
def test_input_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ScaleMoEError, match=message):
        solve_trace(TRACE, PORTS, CostModel(), **arguments)


def test_the_links_choose_between_the_plans_that_a_search_found():
    """On a torus: with the links known, the plan costs there no more than the plan that the ports alone choose."""
    links = Links(build_topology("torus", {"dims": [2, 2, 2], "gpus_per_node": 2}))
    trace = synthesize("clustered", ranks=8, experts=16, layers=1, topk=2, steps=2, tokens_per_rank=500, seed=5)
    cost = CostModel(micro_batches=8)

    def cost_us(known):
        plan = solve_trace(trace, links.ports, cost, replicas=8, links=known, effort=0.3).plan
        return plan_cost(plan, trace, links, cost).total_us

    assert cost_us(links) < cost_us(None)
