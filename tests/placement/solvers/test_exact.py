"""The exact solver against trying all placements, and on the size that the other solvers are held against."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.exact import solve_exact
from megatron_scalemoe.placement.solvers.local_search import solve_local_search
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import LayerTraffic
from tests.placement.tiny import least_cost_us, random_ports, random_problem, routed_layer


def exact_us(problem, seconds=20.0, **others):
    budget = Budget(deadline=time.monotonic() + seconds)
    return home_cost_us(problem, solve_exact(problem, rng=np.random.default_rng(0), budget=budget, **others))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 4)]),
    topk=st.integers(1, 3),
    overlap=st.sampled_from([0, 0.7]),
)
def test_without_deduplication_the_result_is_the_best_of_all_placements(seed, shape, topk, overlap):
    problem = random_problem(seed, ranks=shape[1], experts=shape[0], topk=topk, deduplicate=False, overlap=overlap)
    assert exact_us(problem) == pytest.approx(least_cost_us(problem), rel=1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), nodes=st.sampled_from([(0, 0, 0), (0, 0, 1)]))
def test_with_pairs_of_alike_sources_the_result_is_the_best_of_all_placements(seed, nodes):
    rng = np.random.default_rng(seed)
    problem = LayerProblem(
        traffic=routed_layer(rng, 3, 6, 2, alike=True),
        ports=random_ports(rng, np.array(nodes)),
        cost=CostModel(hidden_size=1024, gpu_TFLOPs=20.0),
    )
    assert exact_us(problem) == pytest.approx(least_cost_us(problem), rel=1e-5)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), topk=st.integers(2, 3))
def test_with_differing_sources_it_comes_close(seed, topk):
    problem = random_problem(seed, ranks=3, experts=6, topk=topk)
    assert exact_us(problem) <= least_cost_us(problem) * 1.1


def test_equal_ranks_are_told_apart_by_their_lowest_expert_only():
    """Symmetry breaking must not cut off every best placement."""
    counts = np.tile([9.0, 7, 5, 4, 3, 2], (3, 1))
    traffic = LayerTraffic(counts, None, counts.sum(axis=0)[None], 1)
    problem = LayerProblem(traffic=traffic, ports=two_level_ports(1, 3), cost=CostModel(gpu_TFLOPs=1.0))
    costs: list[float] = []
    assert exact_us(problem, progress=costs.append) == pytest.approx(least_cost_us(problem))
    assert costs == [pytest.approx(least_cost_us(problem))]


def test_the_default_solver_reaches_the_optimum_of_64_experts_on_8_ranks():
    trace = synthesize("clustered", ranks=8, experts=64, layers=1, topk=1, steps=2, tokens_per_rank=2048, seed=1)
    problem = LayerProblem(traffic=trace.layer(0), ports=two_level_ports(2, 4), cost=CostModel(deduplicate=False))
    found_E = solve_local_search(problem, rng=np.random.default_rng(0), budget=Budget())
    assert exact_us(problem, 15) * (1 - 1e-9) <= home_cost_us(problem, found_E) <= exact_us(problem, 15) * 1.002


def test_a_deadline_in_the_past_still_gives_a_valid_placement_and_says_so():
    problem = random_problem(3, ranks=4, experts=32, topk=1)
    budget = Budget(deadline=time.monotonic() - 1)
    home_rank_E = solve_exact(problem, rng=np.random.default_rng(0), budget=budget)
    assert (np.bincount(home_rank_E, minlength=4) == 8).all()
    assert home_cost_us(problem, home_rank_E) <= home_cost_us(problem, np.repeat(np.arange(4), 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exchange": "2dh"}, "flat exchange only"),
        ({"together": False}, "needs co-activation"),
        ({"experts": 64, "ranks": 4}, "pairs of experts x ranks"),
        ({"experts": 1024, "ranks": 4, "topk": 1}, "experts x ranks"),
    ],
)
def test_what_it_cannot_solve_is_refused_with_the_limit(changes, message):
    problem = random_problem(0, **{"ranks": 2, "experts": 4, "topk": 2, **changes})
    with pytest.raises(ScaleMoEError, match=message):
        solve_exact(problem, rng=np.random.default_rng(0), budget=Budget())
