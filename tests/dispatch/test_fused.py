"""The dispatcher over native transports gives what `RaggedDispatcher` gives, bit for bit: rows, counts, outputs and gradients."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.fused import FusedDispatcher
from tests.dispatch.cases import CASES, Case, make_dispatcher, make_inputs, random_slots, relative_error, there_and_back, transport
from tests.rank_pool import pool

MORE_CASES = {
    "top8-of-32, bf16": Case(experts=32, top_k=8, dtype=torch.bfloat16),
    "fp16": Case(dtype=torch.float16),
    "bf16, odd hidden": Case(hidden=7, tokens=13, dtype=torch.bfloat16, drop_share=0.3),
    "non-contiguous, bf16": Case(non_contiguous=True, dtype=torch.bfloat16),
    "top8-of-8, bf16": Case(top_k=8, dtype=torch.bfloat16, skew=0.0),
}


def differences(cases: dict[str, Case], steps: int) -> list[tuple[str, int, str]]:
    """On each rank: which results differ in any bit, of several steps with different inputs."""
    found = []
    for name, case in cases.items():
        ragged, fused = (make_dispatcher(of, case) for of in ("ragged", "shm"))
        for step in range(steps):
            a, b = (there_and_back(dispatcher, case, dist.get_rank() + 100 * step) for dispatcher in (ragged, fused))
            found += [(name, step, of) for of in a if a[of].dtype != b[of].dtype or not torch.equal(a[of], b[of])]
    return found


def check(world_size: int, cases: dict[str, Case]) -> None:
    assert pool(world_size).run(differences, cases, 2) == [[]] * world_size


@pytest.mark.parametrize("world_size", [2, 4])
def test_bitwise_as_by_collectives(world_size):
    check(world_size, CASES | MORE_CASES)


def test_tensor_parallel_experts():
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    check(4, {f"{name}, {size}": Case(expert_tp_size=size, top_k=3, dtype=dtypes[name]) for name in dtypes for size in (2, 4)})


@pytest.mark.parametrize("replicas_per_rank", [0, 3])
def test_any_placement(replicas_per_rank):
    cases = {"tensor-parallel": Case(expert_tp_size=2, top_k=3, slots=random_slots(8, 2, replicas_per_rank, seed=3))}
    for name in ("top2-skew1.5", "top4-of-32", "bf16", "empty-rank"):
        cases[name] = dataclasses.replace(CASES[name], slots=random_slots(CASES[name].experts, 4, replicas_per_rank, seed=len(name)))
    check(4, cases)


def aligned(alignment: int) -> tuple[list[int], float]:
    """Counts, and the largest error against the same without padding."""
    case = Case(skew=1.5)
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    outputs = []
    for multiple in (1, alignment):
        dispatcher = FusedDispatcher(transport("shm"), case.experts, case.top_k, alignment=multiple)
        rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        y = dispatcher.combine(rows * row_probs[:, None], metadata)
        outputs.append(torch.cat([y, *torch.autograd.grad(y.square().sum(), (x, probs))], 1))
        assert rows.shape[0] == int(tokens_per_expert.sum())
    return tokens_per_expert.tolist(), relative_error(outputs[1], outputs[0].double())


def test_alignment_pads_and_changes_nothing_else():
    for tokens_per_expert, error in pool(2).run(aligned, 16):
        assert all(count % 16 == 0 for count in tokens_per_expert)
        assert error == 0
