"""Every dispatcher against the all-experts-at-hand reference: outputs, gradients, order and bytes."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.ops.reference import moe_layer
from tests.rank_pool import pool


@dataclasses.dataclass(frozen=True)
class Case:
    """One routing problem; `skew` is a Zipf exponent, `empty_ranks` get no tokens."""

    tokens: int = 48
    hidden: int = 16
    experts: int = 8
    top_k: int = 2
    skew: float = 1.0
    dtype: torch.dtype = torch.float32
    empty_ranks: tuple[int, ...] = ()
    one_hot_expert: int | None = None
    drop_share: float = 0.0
    non_contiguous: bool = False
    expert_tp_size: int = 1


CASES = {
    "top1": Case(top_k=1),
    "top2-uniform": Case(skew=0.0),
    "top2-skew1.5": Case(skew=1.5),
    "top8-of-8": Case(top_k=8),
    "top4-of-32": Case(experts=32, top_k=4),
    "one-expert-per-rank": Case(experts=4, top_k=2),
    "bf16": Case(dtype=torch.bfloat16),
    "fp64": Case(dtype=torch.float64),
    "odd-hidden": Case(hidden=7, tokens=13),
    "empty-rank": Case(empty_ranks=(0,)),
    "all-empty": Case(empty_ranks=(0, 1, 2, 3)),
    "one-hot-expert": Case(top_k=1, one_hot_expert=5),
    "dropped-tokens": Case(drop_share=0.5),
    "non-contiguous": Case(non_contiguous=True),
}


def make_inputs(case: Case, rank: int):
    """x [T, D], probs [T, E], routing_map [T, E] of one rank; x and probs are leaves."""
    g = torch.Generator().manual_seed(1000 + rank)
    tokens = 0 if rank in case.empty_ranks else case.tokens
    x = torch.randn(tokens, case.hidden, generator=g, dtype=torch.float64).to(case.dtype)
    if case.non_contiguous:
        x = torch.randn(case.hidden, tokens, generator=g).to(case.dtype).T
    popularity = torch.arange(1, case.experts + 1, dtype=torch.float64) ** -case.skew
    if tokens:
        chosen = torch.multinomial(popularity.expand(tokens, -1), case.top_k, generator=g)
    else:
        chosen = torch.zeros(0, case.top_k, dtype=torch.int64)
    if case.one_hot_expert is not None:
        chosen = torch.full_like(chosen, case.one_hot_expert)
    routing_map = torch.zeros(tokens, case.experts, dtype=torch.bool).scatter(1, chosen, True)
    routing_map &= torch.rand(tokens, case.experts, generator=g) >= case.drop_share
    probs_dtype = torch.float32 if case.dtype == torch.bfloat16 else case.dtype
    probs = torch.rand(tokens, case.experts, generator=g).to(probs_dtype) * routing_map
    return x.requires_grad_(), probs.requires_grad_(), routing_map


def expert(e: int, x, probs, shard: int = 0, shards: int = 1):
    """Logical expert e: a fixed elementwise function that differs between experts; a shard gives its part of the output."""
    scale = torch.cos(torch.arange(x.shape[1], dtype=torch.float32) + e)
    part = 1.0 / shards if shards > 1 else 1.0
    return ((torch.tanh(x.float()) * scale + x.float()) * part * probs[:, None]).to(x.dtype)


def make_dispatcher(kind: str, case: Case):
    group = dist.group.WORLD
    if kind == "ragged":
        return RaggedDispatcher(group, case.experts, case.top_k, case.expert_tp_size)
    if kind == "padded":
        return PaddedDispatcher(group, case.experts, case.top_k)
    return LocalDispatcher()


def run_case(kind: str, case: Case) -> dict:
    """On each rank: dispatch, experts, combine, backward; compare with the reference. Returns the largest errors."""
    rank = dist.get_rank()
    x, probs, routing_map = make_inputs(case, rank)
    dispatcher = make_dispatcher(kind, case)
    rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
    assert rows.shape == (int(tokens_per_expert.sum()), case.hidden) and row_probs.shape == rows.shape[:1]
    num_local = len(tokens_per_expert)
    block = rank // case.expert_tp_size if kind != "local" else 0
    per_expert = zip(rows.split(tokens_per_expert.tolist()), row_probs.split(tokens_per_expert.tolist()), strict=True)
    outputs = [
        expert(block * num_local + i, xs, ps, rank % case.expert_tp_size, case.expert_tp_size) for i, (xs, ps) in enumerate(per_expert)
    ]
    y = dispatcher.combine(torch.cat(outputs), metadata)
    weights = torch.linspace(0.5, 1.5, case.hidden).to(case.dtype)
    (y * weights).sum().backward()

    reference_x, reference_probs = x.detach().double().requires_grad_(), probs.detach().double().requires_grad_()

    def reference_expert(e, xs, ps):
        scale = torch.cos(torch.arange(case.hidden, dtype=torch.float32) + e).double()
        return (torch.tanh(xs) * scale + xs) * ps[:, None]

    reference = moe_layer(reference_x, reference_probs, routing_map, reference_expert)
    (reference * weights.double()).sum().backward()
    return {
        "y": relative_error(y, reference),
        "grad_x": relative_error(x.grad, reference_x.grad),
        "grad_probs": relative_error(probs.grad * routing_map, reference_probs.grad * routing_map),
        "tokens": tokens_per_expert.tolist(),
        "counts": routing_map.sum(0).tolist(),
    }


def relative_error(a, b) -> float:
    if b.numel() == 0:
        return 0.0 if a.numel() == 0 else float("inf")
    return float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))


def check(results: list[dict], case: Case, kind: str) -> None:
    tolerance = 2e-2 if case.dtype == torch.bfloat16 else 1e-6
    for rank, result in enumerate(results):
        for name in ("y", "grad_x", "grad_probs"):
            assert result[name] <= tolerance, f"rank {rank} {name}: relative error {result[name]:.2e}"
    if kind != "padded":
        wanted = torch.tensor([result["counts"] for result in results]).sum(0)
        blocks = len(results) // case.expert_tp_size
        per_block = wanted.reshape(blocks, -1).repeat_interleave(case.expert_tp_size, 0).tolist()
        assert [result["tokens"] for result in results] == per_block


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ragged(name, world_size):
    check(pool(world_size).run(run_case, "ragged", CASES[name]), CASES[name], "ragged")


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_padded(name, world_size):
    check(pool(world_size).run(run_case, "padded", CASES[name]), CASES[name], "padded")


@pytest.mark.parametrize("expert_tp_size", [2, 4])
def test_ragged_with_tensor_parallel_experts(expert_tp_size):
    case = Case(expert_tp_size=expert_tp_size, top_k=3)
    check(pool(4).run(run_case, "ragged", case), case, "ragged")
