"""Dispatch in two hops, host by host, against the flat one. Four ranks stand for two hosts of two."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.fused import FusedDispatcher
from megatron_scalemoe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_scalemoe.dispatch.placed import PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.ops.transports.registry import register
from megatron_scalemoe.ops.transports.shm import open_shm
from megatron_scalemoe.ops.wire import WireMeter
from tests.dispatch.test_dispatch import CASES, Case, check, make_inputs, run_case
from tests.dispatch.test_fused import placed
from tests.dispatch.test_placed import random_slots
from tests.rank_pool import COLLECTIVE_TIMEOUT_S, pool

HOSTS, RANKS_PER_HOST = 2, 2


@functools.cache
def groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this rank's host, and the ranks with its position."""
    host, position = divmod(dist.get_rank(), RANKS_PER_HOST)
    options = {"use_local_synchronization": True}
    inside = dist.new_group([host * RANKS_PER_HOST + p for p in range(RANKS_PER_HOST)], **options)
    return inside, dist.new_group([h * RANKS_PER_HOST + position for h in range(HOSTS)], **options)


@functools.cache
def transport() -> int:
    return register(open_shm(groups()[0], COLLECTIVE_TIMEOUT_S))


def make_dispatcher(inner: str, case: Case) -> HierarchicalDispatcher:
    inside, between = groups()
    columns = case.experts * case.expert_tp_size
    sizes = columns // HOSTS, case.top_k * case.expert_tp_size
    of_host = RaggedDispatcher(inside, *sizes) if inner == "ragged" else FusedDispatcher(transport(), *sizes)
    return HierarchicalDispatcher(between, RANKS_PER_HOST, of_host, case.experts, case.top_k, case.expert_tp_size)


def run_hierarchical(inner: str, case: Case) -> dict:
    return run_case("hierarchical", case, make=lambda kind, case: make_dispatcher(inner, case))


@pytest.mark.parametrize("inner", ["ragged", "shm"])
@pytest.mark.parametrize("name", CASES)
def test_as_all_experts_at_hand(name, inner):
    check(pool(4).run(run_hierarchical, inner, CASES[name]), CASES[name], "hierarchical")


@pytest.mark.parametrize("inner", ["ragged", "shm"])
@pytest.mark.parametrize("expert_tp_size", [2, 4])
def test_tensor_parallel_experts(expert_tp_size, inner):
    case = Case(expert_tp_size=expert_tp_size, top_k=3)
    check(pool(4).run(run_hierarchical, inner, case), case, "hierarchical")


def run_placed(inner: str, case: Case) -> dict:
    def make(kind: str, case: Case) -> PlacedDispatcher:
        hierarchical = make_dispatcher(inner, dataclasses.replace(case, experts=len(case.slots)))
        return placed(hierarchical, case, functools.partial(gather_by_collective, dist.group.WORLD))

    return run_case("placed", case, make=make)


@pytest.mark.parametrize("inner", ["ragged", "shm"])
@pytest.mark.parametrize(("expert_tp_size", "replicas_per_rank"), [(1, 2), (2, 2)])
def test_placements(expert_tp_size, replicas_per_rank, inner):
    slots = random_slots(8, 4 // expert_tp_size, replicas_per_rank, seed=1)
    results = pool(4).run(run_placed, inner, Case(top_k=3, slots=slots, expert_tp_size=expert_tp_size))
    for result in results:
        assert max(result[name] for name in ("y", "grad_x", "grad_probs")) <= 1e-6
    assert sum(sum(result["tokens"]) for result in results) == expert_tp_size * sum(sum(result["counts"]) for result in results)


def rows_of_first_expert(inner: str) -> list:
    """Rows of this rank's first expert, which carry (source rank, token) in their values."""
    rank, tokens = dist.get_rank(), 3
    x = torch.stack([torch.full((tokens,), float(rank)), torch.arange(tokens).float()], 1)
    routing_map = torch.ones(tokens, 4, dtype=torch.bool)
    rows, tokens_per_expert, _, _ = make_dispatcher(inner, Case(experts=4, top_k=4)).dispatch(x, routing_map.float(), routing_map)
    return rows[: tokens_per_expert[0]].tolist()


@pytest.mark.parametrize("inner", ["ragged", "shm"])
def test_rows_are_in_expert_position_host_token_order(inner):
    for rows in pool(4).run(rows_of_first_expert, inner):
        assert rows == [[float(rank), float(token)] for rank in (0, 2, 1, 3) for token in range(3)]


def bytes_between_hosts(inner: str, case: Case) -> tuple[int, int]:
    """Bytes that left this rank by collectives in the forward dispatch, and the least that can: one row per token and other host."""
    host = dist.get_rank() // RANKS_PER_HOST
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher = make_dispatcher(inner, case)
    with WireMeter() as meter, torch.no_grad():
        dispatcher.dispatch(x, probs, routing_map)
    goes_TH = routing_map.unflatten(1, (HOSTS, -1)).any(2)
    pairs = int(goes_TH.sum() - goes_TH[:, host].sum())
    return meter.bytes_out, pairs * case.hidden * case.dtype.itemsize


@pytest.mark.parametrize("top_k", [2, 8])
def test_a_token_goes_once_to_each_host(top_k):
    """Inside a host rows go through shared memory, so that collectives carry the first hop alone."""
    case = Case(tokens=512, hidden=1024, top_k=top_k, experts=32)
    for bytes_out, least in pool(4).run(bytes_between_hosts, "shm", case):
        assert least > 0
        assert bytes_out <= 1.03 * least
