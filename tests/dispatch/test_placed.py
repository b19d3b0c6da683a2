"""Dispatch under any placement, against the all-experts-at-hand reference; and the split over the copies is the planner's."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import split_tokens
from tests.dispatch.test_dispatch import CASES, NODES, Case, run_case
from tests.rank_pool import pool


def random_slots(experts: int, ranks: int, replicas_per_rank: int, seed: int) -> tuple[int, ...]:
    """Permuted homes, and beside them up to so many random replicas on each rank."""
    rng = np.random.default_rng(seed)
    slots = []
    for homes in rng.permutation(experts).reshape(ranks, -1):
        others = np.setdiff1d(np.arange(experts), homes)
        copies = rng.choice(others, min(replicas_per_rank, others.size), replace=False)
        copies = np.where(rng.random(copies.size) < 0.8, copies, EMPTY)
        slots += [*homes.tolist(), *copies.tolist()]
    return tuple(slots)


def check(world_size: int, case: Case) -> None:
    results = pool(world_size).run(run_case, "placed", case)
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-6
    for rank, result in enumerate(results):
        for name in ("y", "grad_x", "grad_probs"):
            assert result[name] <= tolerance, f"rank {rank} {name}: relative error {result[name]:.2e}"
    ranks = world_size // case.expert_tp_size
    counts_GE = np.array([result["counts"] for result in results]).reshape(ranks, case.expert_tp_size, -1).sum(1)
    tokens_P = split_tokens(counts_GE, np.array(case.slots), ranks, np.array(NODES[ranks])).sum(0)
    wanted = tokens_P.reshape(ranks, -1).repeat(case.expert_tp_size, axis=0)
    assert [result["tokens"] for result in results] == wanted.tolist()


@pytest.mark.parametrize("replicas_per_rank", [0, 1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_any_placement(name, world_size, replicas_per_rank):
    case = CASES[name]
    slots = random_slots(case.experts, world_size, replicas_per_rank, seed=len(name) + replicas_per_rank)
    check(world_size, dataclasses.replace(case, slots=slots))


def test_every_rank_holds_every_expert():
    check(4, Case(slots=random_slots(8, 4, 6, seed=0), skew=1.5))


@pytest.mark.parametrize("replicas_per_rank", [0, 2])
def test_tensor_parallel_experts(replicas_per_rank):
    slots = random_slots(8, 2, replicas_per_rank, seed=3)
    check(4, Case(expert_tp_size=2, top_k=3, slots=slots))


def test_replicas_even_out_a_skewed_load():
    """One hot expert on each of four ranks' replica slots: every rank computes a quarter of it."""
    slots = (0, 1, EMPTY, 2, 3, 0, 4, 5, 0, 6, 7, 0)
    case = Case(top_k=1, one_hot_expert=0, slots=slots)
    results = pool(4).run(run_case, "placed", case)
    assert [sum(result["tokens"]) for result in results] == [48] * 4
