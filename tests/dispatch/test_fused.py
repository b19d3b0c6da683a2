"""The dispatcher over native transports gives what `RaggedDispatcher` gives, bit for bit: rows, counts, outputs and gradients."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.base import Dispatcher
from megatron_scalemoe.dispatch.fused import FusedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.ops import library
from megatron_scalemoe.ops.transports.registry import register
from megatron_scalemoe.ops.transports.shm import open_shm
from tests.dispatch.test_dispatch import CASES, NODES, Case, error_of_two_experts, expert, make_inputs, relative_error
from tests.dispatch.test_placed import random_slots
from tests.ops.reference import ReferenceTransport
from tests.rank_pool import COLLECTIVE_TIMEOUT_S, pool

MORE_CASES = {
    "top8-of-32, bf16": Case(experts=32, top_k=8, dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16),
    "bf16, odd hidden": Case(hidden=7, tokens=13, dtype=torch.bfloat16, drop_share=0.3),
    "non-contiguous, bf16": Case(non_contiguous=True, dtype=torch.bfloat16),
    "top8-of-8, bf16": Case(top_k=8, dtype=torch.bfloat16, skew=0.0),
}


@functools.cache
def transport(kind: str) -> int:
    """Of all ranks of the pool, opened once."""
    world = dist.group.WORLD
    return register(ReferenceTransport(world) if kind == "reference" else open_shm(world, COLLECTIVE_TIMEOUT_S))


def placed(inner: Dispatcher, case: Case, gather_counts) -> PlacedDispatcher:
    ranks = dist.get_world_size() // case.expert_tp_size
    placement = LayerPlacement(np.array(case.slots), ranks, np.array(NODES[ranks]))
    return PlacedDispatcher(inner, placement, dist.get_rank(), case.expert_tp_size, gather_counts, torch.device("cpu"))


def dispatchers(kind: str, case: Case) -> tuple[Dispatcher, Dispatcher]:
    """By collectives, and over the transport."""
    sizes = len(case.slots) or case.experts, case.top_k, case.expert_tp_size
    ragged, fused = RaggedDispatcher(dist.group.WORLD, *sizes), FusedDispatcher(transport(kind), *sizes)
    if not case.slots:
        return ragged, fused
    by_transport = functools.partial(library.gather_counts, transport(kind))
    return placed(ragged, case, functools.partial(gather_by_collective, dist.group.WORLD)), placed(fused, case, by_transport)


def results(dispatcher: Dispatcher, case: Case, steps: int) -> dict[str, torch.Tensor]:
    """Everything that a dispatcher gives, of several steps with different inputs."""
    found = {}
    for step in range(steps):
        x, probs, routing_map = make_inputs(case, dist.get_rank() + 100 * step)
        rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        counts = tokens_per_expert.tolist()
        shard = dist.get_rank() % case.expert_tp_size, case.expert_tp_size
        per_expert = zip(range(len(counts)), rows.split(counts), row_probs.split(counts), strict=True)
        y = dispatcher.combine(torch.cat([expert(e, xs, ps, *shard) for e, xs, ps in per_expert]), metadata)
        (y * torch.linspace(0.5, 1.5, case.hidden).to(case.dtype)).sum().backward()
        of_step = {"rows": rows, "counts": tokens_per_expert, "row_probs": row_probs, "y": y, "grad_x": x.grad, "grad_probs": probs.grad}
        found |= {f"{name} of step {step}": tensor.detach() for name, tensor in of_step.items()}
    return found


def differences(kind: str, case: Case, steps: int = 1) -> list[str]:
    """On each rank: which results differ in any bit."""
    ragged, fused = (results(dispatcher, case, steps) for dispatcher in dispatchers(kind, case))
    return [name for name in ragged if ragged[name].dtype != fused[name].dtype or not torch.equal(ragged[name], fused[name])]


def check(world_size: int, kind: str, case: Case, **options) -> None:
    found = pool(world_size).run(functools.partial(differences, **options), kind, case)
    assert found == [[]] * world_size


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", [*CASES, *MORE_CASES])
def test_bitwise_as_by_collectives(name, world_size):
    check(world_size, "shm", {**CASES, **MORE_CASES}[name], steps=3)


@pytest.mark.parametrize("name", ["top2-skew1.5", "bf16", "empty-rank", "dropped-tokens"])
def test_the_reference_transport_agrees(name):
    check(2, "reference", CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("expert_tp_size", [2, 4])
def test_tensor_parallel_experts(expert_tp_size, dtype):
    check(4, "shm", Case(expert_tp_size=expert_tp_size, top_k=3, dtype=dtype))


@pytest.mark.parametrize("replicas_per_rank", [0, 1, 3])
@pytest.mark.parametrize("name", ["top2-skew1.5", "top4-of-32", "bf16", "empty-rank"])
def test_any_placement(name, replicas_per_rank):
    case = dataclasses.replace(CASES[name], slots=random_slots(CASES[name].experts, 4, replicas_per_rank, seed=len(name)))
    check(4, "shm", case, steps=2)


def test_placement_with_tensor_parallel_experts():
    check(4, "shm", Case(expert_tp_size=2, top_k=3, slots=random_slots(8, 2, 2, seed=3)))


def several_in_flight(order: list[int]) -> list[bool]:
    """Three dispatches of one dispatcher, stage by stage interleaved: is each the same as alone, forward and backward?"""
    _, dispatcher = dispatchers("shm", Case())
    inputs = [make_inputs(dataclasses.replace(Case(), tokens=16 + 8 * i), dist.get_rank()) for i in range(3)]
    alone = []
    for x, probs, routing_map in inputs:
        rows, _, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        y = dispatcher.combine(rows * row_probs[:, None], metadata)
        alone.append((y, *torch.autograd.grad(y.square().sum(), (x, probs))))
    flights = {i: dispatcher.prepare(*inputs[i]) for i in order}
    flights = {i: dispatcher.exchange(flights[i]) for i in order}
    expanded = {i: dispatcher.expand(flights[i]) for i in reversed(order)}
    reduced = {i: dispatcher.reduce(rows * probs[:, None], metadata) for i, (rows, _, probs, metadata) in expanded.items()}
    returned = {i: dispatcher.exchange_back(reduced[i], expanded[i][3]) for i in order}
    y = {i: dispatcher.restore(returned[i], expanded[i][3]) for i in order}
    together = {i: (y[i], *torch.autograd.grad(y[i].square().sum(), inputs[i][:2])) for i in reversed(order)}
    return [all(map(torch.equal, together[i], alone[i])) for i in range(3)]


def test_several_dispatches_may_be_in_flight():
    assert pool(2).run(several_in_flight, [2, 0, 1]) == [[True] * 3] * 2


def aligned(kind: str, alignment: int) -> tuple[list[int], float]:
    """Counts, and the largest error against the same without padding."""
    case = Case(skew=1.5)
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    outputs = []
    for multiple in (1, alignment):
        dispatcher = FusedDispatcher(transport(kind), case.experts, case.top_k, alignment=multiple)
        rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        y = dispatcher.combine(rows * row_probs[:, None], metadata)
        outputs.append(torch.cat([y, *torch.autograd.grad(y.square().sum(), (x, probs))], 1))
        assert rows.shape[0] == int(tokens_per_expert.sum())
    return tokens_per_expert.tolist(), relative_error(outputs[1], outputs[0].double())


@pytest.mark.parametrize("kind", ["reference", "shm"])
def test_alignment_pads_and_changes_nothing_else(kind):
    for tokens_per_expert, error in pool(2).run(aligned, kind, 16):
        assert all(count % 16 == 0 for count in tokens_per_expert)
        assert error == 0


def too_many_experts() -> str:
    return error_of_two_experts(FusedDispatcher(transport("shm"), num_experts=4, max_experts_per_token=1))


def test_an_expert_is_never_dropped_silently():
    assert all("a token with 2" in message for message in pool(2).run(too_many_experts))
