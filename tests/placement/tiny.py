"""Tiny layers whose placements can all be tried, for the tests of bounds and solvers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.objective import home_cost_us
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.topology.ports import Ports, PortSide
from megatron_scalemoe.traffic.trace import LayerTraffic


def random_ports(rng: np.random.Generator, node_of_rank: np.ndarray, *, symmetric: bool = False) -> Ports:
    """Every port with a bandwidth of its own."""
    nodes = int(node_of_rank.max()) + 1
    sizes = (node_of_rank.size, node_of_rank.size, nodes)
    into = PortSide(*(rng.uniform(10, 200, size) for size in sizes))
    out = into if symmetric else PortSide(*(rng.uniform(10, 200, size) for size in sizes))
    return Ports(node_of_rank=node_of_rank, into=into, out=out, scale_up_latency_us=1.5, scale_out_latency_us=6.0)


def routed_layer(
    rng: np.random.Generator, ranks: int, experts: int, topk: int, *, tokens: int = 40, together: bool = True, alike: bool = False
) -> LayerTraffic:
    """Tokens drawn one by one: skewed popularity, sources with a taste of their own (or all alike), co-activation as counted."""
    popularity_E = rng.dirichlet(np.full(experts, 0.7)) + 1e-3
    counts_GE, pairs_EE = np.zeros((ranks, experts)), np.zeros((experts, experts))
    for rank in range(ranks):
        taste_E = popularity_E * (1.0 if alike else rng.uniform(0.2, 2.0, experts))
        for _ in range(tokens):
            chosen = rng.choice(experts, topk, replace=False, p=taste_E / taste_E.sum())
            counts_GE[rank, chosen] += 1
            pairs_EE[np.ix_(chosen, chosen)] += 1
    np.fill_diagonal(pairs_EE, 0)
    if alike:
        counts_GE[:] = counts_GE.mean(axis=0)
    return LayerTraffic(counts_GE, pairs_EE if together else None, counts_GE.sum(axis=0)[None], topk)


def random_problem(seed: int, *, ranks: int, experts: int, topk: int, together: bool = True, replicas: int = 0, **cost) -> LayerProblem:
    """A layer on ranks spread over one to three nodes, its compute and communication of like size."""
    rng = np.random.default_rng(seed)
    node_of_rank = np.sort(rng.integers(0, rng.integers(1, 4), ranks))
    node_of_rank = np.unique(node_of_rank, return_inverse=True)[1]
    constants = {"hidden_size": 1024, "gpu_TFLOPs": float(rng.choice([2.0, 20.0, 400.0])), **cost}
    return LayerProblem(
        traffic=routed_layer(rng, ranks, experts, topk, together=together),
        ports=random_ports(rng, node_of_rank, symmetric=bool(rng.integers(2))),
        cost=CostModel(**constants),
        replicas=replicas,
    )


def all_homes(experts: int, ranks: int) -> Iterator[np.ndarray]:
    """Every assignment with experts / ranks homes on each rank."""
    size = experts // ranks

    def fill(home_rank_E: np.ndarray, rank: int) -> Iterator[np.ndarray]:
        free = np.flatnonzero(home_rank_E < 0)
        if not free.size:
            yield home_rank_E
            return
        for chosen in itertools.combinations(free, size):
            filled_E = home_rank_E.copy()
            filled_E[list(chosen)] = rank
            yield from fill(filled_E, rank + 1)

    yield from fill(np.full(experts, -1), 0)


def least_cost_us(problem: LayerProblem) -> float:
    """By trying all placements of the homes."""
    return min(home_cost_us(problem, home_rank_E) for home_rank_E in all_homes(problem.num_experts, problem.num_ranks))
