"""Every dispatcher against the all-experts-at-hand reference: outputs, gradients, order and bytes."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.base import Dispatcher
from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.wire import WireMeter
from tests.ops.reference import moe_layer
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
    slots: tuple[int, ...] = ()  # with the dispatch "placed": the expert of each slot, EMPTY for none


NODES = {2: (0, 0), 4: (0, 0, 1, 1)}
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


class BoundedDispatcher(RaggedDispatcher):
    """Prepares as many rows as on CUDA, where the counts come too late, and so takes that path on CPU ranks."""

    def _bound_rows(self, num_tokens, send_rows_G):
        return num_tokens * self.max_rows_per_token


def make_dispatcher(kind: str, case: Case):
    group = dist.group.WORLD
    if kind == "bounded":
        return BoundedDispatcher(group, case.experts, case.top_k, case.expert_tp_size)
    if kind == "ragged":
        return RaggedDispatcher(group, case.experts, case.top_k, case.expert_tp_size)
    if kind == "padded":
        return PaddedDispatcher(group, case.experts, case.top_k)
    if kind == "placed":
        ranks = group.size() // case.expert_tp_size
        placement = LayerPlacement(np.array(case.slots), ranks, np.array(NODES[ranks]))
        inner = RaggedDispatcher(group, len(case.slots), case.top_k, case.expert_tp_size)
        gather_counts = functools.partial(gather_by_collective, group)
        return PlacedDispatcher(inner, placement, group.rank(), case.expert_tp_size, gather_counts, torch.device("cpu"))
    return LocalDispatcher()


def run_case(kind: str, case: Case, make=make_dispatcher) -> dict:
    """On each rank: dispatch, experts, combine, backward; compare with the reference. Returns the largest errors."""
    rank = dist.get_rank()
    x, probs, routing_map = make_inputs(case, rank)
    dispatcher = make(kind, case)
    rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
    assert rows.shape == (int(tokens_per_expert.sum()), case.hidden) and row_probs.shape == rows.shape[:1]
    num_local = len(tokens_per_expert)
    block = rank // case.expert_tp_size if kind != "local" else 0
    first = block * num_local
    logical = case.slots[first : first + num_local] if kind == "placed" else range(first, first + num_local)
    per_expert = zip(logical, rows.split(tokens_per_expert.tolist()), row_probs.split(tokens_per_expert.tolist()), strict=True)
    outputs = [expert(e, xs, ps, rank % case.expert_tp_size, case.expert_tp_size) for e, xs, ps in per_expert]
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


@pytest.mark.parametrize("name", CASES)
def test_ragged_with_the_row_bound_of_cuda(name):
    check(pool(4).run(run_case, "bounded", CASES[name]), CASES[name], "bounded")


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_padded(name, world_size):
    check(pool(world_size).run(run_case, "padded", CASES[name]), CASES[name], "padded")


@pytest.mark.parametrize("expert_tp_size", [2, 4])
def test_ragged_with_tensor_parallel_experts(expert_tp_size):
    case = Case(expert_tp_size=expert_tp_size, top_k=3)
    check(pool(4).run(run_case, "ragged", case), case, "ragged")


def several_in_flight(order: list[int]) -> list[float]:
    """Three dispatches of one dispatcher, stage by stage interleaved; returns each one's error against running it alone."""
    dispatcher = make_dispatcher("ragged", Case())
    inputs = [make_inputs(dataclasses.replace(Case(), tokens=16 + 8 * i), dist.get_rank()) for i in range(3)]
    with torch.no_grad():
        alone = []
        for x, probs, routing_map in inputs:
            rows, _, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
            alone.append(dispatcher.combine(rows * row_probs[:, None], metadata))
        flights = {i: dispatcher.prepare(*inputs[i]) for i in order}
        flights = {i: dispatcher.exchange(flights[i]) for i in order}
        expanded = {i: dispatcher.expand(flights[i]) for i in reversed(order)}
        reduced = {i: dispatcher.reduce(rows * probs[:, None], metadata) for i, (rows, _, probs, metadata) in expanded.items()}
        returned = {i: dispatcher.exchange_back(reduced[i], expanded[i][3]) for i in order}
        return [relative_error(dispatcher.restore(returned[i], expanded[i][3]), alone[i].double()) for i in range(3)]


def test_several_dispatches_may_be_in_flight():
    for errors in pool(2).run(several_in_flight, [2, 0, 1]):
        assert errors == [0.0, 0.0, 0.0]


def rows_of_first_expert() -> tuple[list, list]:
    """Rows of this rank's first expert, which carry (source rank, token) in their values."""
    rank = dist.get_rank()
    tokens = 6
    x = torch.stack([torch.full((tokens,), float(rank)), torch.arange(tokens).float()], 1)
    routing_map = torch.zeros(tokens, 4, dtype=torch.bool)
    routing_map[:, [0, 2]] = True
    rows, tokens_per_expert, _, _ = make_dispatcher("ragged", Case(experts=4)).dispatch(x, routing_map.float(), routing_map)
    return rows[: tokens_per_expert[0]].tolist(), tokens_per_expert.tolist()


def test_rows_are_in_expert_source_token_order():
    for rows, tokens_per_expert in pool(2).run(rows_of_first_expert):
        assert rows == [[float(source), float(token)] for source in range(2) for token in range(6)]
        assert tokens_per_expert == [12, 0]


def bytes_of_dispatch(case: Case) -> tuple[int, int]:
    """Bytes that left this rank in the forward dispatch, and the least that can: one row per token and other rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x, probs, routing_map = make_inputs(case, rank)
    with WireMeter() as meter, torch.no_grad():
        make_dispatcher("ragged", case).dispatch(x, probs, routing_map)
    goes_TG = routing_map.unflatten(1, (size, -1)).any(2)
    pairs = int(goes_TG.sum() - goes_TG[:, rank].sum())
    return meter.bytes_out, pairs * case.hidden * case.dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world_size", "top_k"), [(2, 2), (4, 2), (4, 8)])
def test_bytes_are_one_row_per_token_and_rank_plus_little(world_size, top_k, dtype):
    case = Case(tokens=512, hidden=1024, top_k=top_k, dtype=dtype, experts=32)
    for bytes_out, least in pool(world_size).run(bytes_of_dispatch, case):
        assert least < bytes_out <= 1.03 * least


def backward_collectives(case: Case) -> tuple[int, int]:
    """Bytes of the forward and of the backward pass."""
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher = make_dispatcher("ragged", case)
    with WireMeter() as meter:
        rows, _, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        y = dispatcher.combine(rows * row_probs[:, None], metadata)
        forward = meter.bytes_out
        y.sum().backward()
    return forward, meter.bytes_out - forward


def test_backward_moves_no_more_than_forward():
    results = pool(4).run(backward_collectives, Case(tokens=256, hidden=256))
    assert sum(backward for _, backward in results) <= sum(forward for forward, _ in results)


def capacity_factor_drops() -> tuple[int, float]:
    """With a capacity factor, the rows per expert and how much probability was dropped."""
    case = Case(tokens=40, top_k=2, experts=4, skew=2.0)
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher = PaddedDispatcher(dist.group.WORLD, case.experts, case.top_k, capacity_factor=1.0)
    rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
    y = dispatcher.combine(rows * row_probs[:, None], metadata)
    position = routing_map.cumsum(0) - 1
    kept = probs * (routing_map & (position < 20))
    error = relative_error(y, (x * kept.sum(1, keepdim=True)).double())
    return int(tokens_per_expert[0]), error


def test_padded_capacity_factor_keeps_the_first_tokens():
    # ceil(1.0 * 40 tokens * 2 / 4 experts) = 20 rows from each of 2 ranks
    for per_expert, error in pool(2).run(capacity_factor_drops):
        assert per_expert == 40
        assert error <= 1e-6


def local_case(name: str) -> dict:
    return run_case("local", CASES[name])


@pytest.mark.parametrize("name", ["top1", "top2-skew1.5", "top8-of-8", "bf16", "all-empty", "dropped-tokens", "non-contiguous"])
def test_local(name):
    results = pool(2).run(local_case, name)
    tolerance = 2e-2 if CASES[name].dtype == torch.bfloat16 else 1e-6
    for result in results:
        assert max(result["y"], result["grad_x"], result["grad_probs"]) <= tolerance
        assert result["tokens"] == result["counts"]


def error_of_two_experts(dispatcher: Dispatcher) -> str:
    """What a dispatcher for top-1 says of a token with two experts."""
    routing_map = torch.tensor([[True, True, False, False]])
    try:
        dispatcher.prepare(torch.zeros(1, 2), routing_map.float(), routing_map)
    except ScaleMoEError as error:
        return str(error)
    return ""


def too_many_experts() -> str:
    return error_of_two_experts(RaggedDispatcher(dist.group.WORLD, num_experts=4, max_experts_per_token=1))


def test_an_expert_is_never_dropped_silently():
    assert all("a token with 2" in message for message in pool(2).run(too_many_experts))
