"""Routing problems, every dispatcher for them on the ranks of a pool, and what any dispatcher must give. Imported by pool workers, too."""

import dataclasses
import functools

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.base import Dispatcher
from megatron_scalemoe.dispatch.fused import FusedDispatcher
from megatron_scalemoe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.ops import library
from megatron_scalemoe.ops.transports.registry import register
from megatron_scalemoe.ops.transports.shm import open_shm
from megatron_scalemoe.plan.placement_plan import EMPTY
from megatron_scalemoe.plan.split import split_tokens
from tests.rank_pool import COLLECTIVE_TIMEOUT_S, pool


@dataclasses.dataclass(frozen=True)
class Case:
    """One routing problem; `skew` is a Zipf exponent, `empty_ranks` get no tokens. slots: under a placement, the expert of each."""

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
    slots: tuple[int, ...] = ()

    @property
    def tolerance(self) -> float:
        return 2e-2 if self.dtype == torch.bfloat16 else 1e-6


NODES = {1: (0,), 2: (0, 0), 4: (0, 0, 1, 1)}
CASES = {
    "top1": Case(top_k=1),
    "top2-skew1.5": Case(skew=1.5),
    "top8-of-8": Case(top_k=8),
    "top4-of-32": Case(experts=32, top_k=4),
    "one-expert-per-rank": Case(experts=4, top_k=2),
    "bf16": Case(dtype=torch.bfloat16),
    "fp64": Case(dtype=torch.float64),
    "odd-hidden": Case(hidden=7, tokens=13),
    "empty-rank": Case(empty_ranks=(0,)),
    "all-empty": Case(empty_ranks=(0, 1, 2, 3)),
    "one-hot-expert": Case(top_k=1, one_hot_expert=3),
    "dropped-tokens": Case(drop_share=0.5),
    "non-contiguous": Case(non_contiguous=True),
}
HOSTS, RANKS_PER_HOST = 2, 2  # of the hierarchical dispatcher


def make_inputs(case: Case, seed: int):
    """x [T, D], probs [T, E], routing_map [T, E] of one rank; x and probs are leaves."""
    g = torch.Generator().manual_seed(1000 + seed)
    tokens = 0 if seed in case.empty_ranks else case.tokens
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


class BoundedDispatcher(RaggedDispatcher):
    """Prepares as many rows as on CUDA, where the counts come too late, and so takes that path on CPU ranks."""

    def _bound_rows(self, num_tokens, send_rows_G):
        return num_tokens * self.max_rows_per_token


@functools.cache
def transport(kind: str) -> int:
    """Of all ranks of the pool, or of this rank's host; opened once."""
    return register(open_shm(host_groups()[0] if kind == "host" else dist.group.WORLD, COLLECTIVE_TIMEOUT_S))


@functools.cache
def host_groups() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this rank's host, and the ranks with its position. Four ranks stand for two hosts of two."""
    host, position = divmod(dist.get_rank(), RANKS_PER_HOST)
    options = {"use_local_synchronization": True}
    inside = dist.new_group([host * RANKS_PER_HOST + p for p in range(RANKS_PER_HOST)], **options)
    return inside, dist.new_group([h * RANKS_PER_HOST + position for h in range(HOSTS)], **options)


def make_dispatcher(kind: str, case: Case) -> Dispatcher:
    """local, ragged, bounded, padded, shm, or hierarchical over ragged or shm; with slots inside a placed one."""
    world = dist.group.WORLD
    sizes = len(case.slots) or case.experts, case.top_k, case.expert_tp_size
    gather_counts = functools.partial(gather_by_collective, world)
    if kind == "local":
        return LocalDispatcher()
    if kind == "padded":
        return PaddedDispatcher(world, *sizes[:2])
    if kind == "shm":
        dispatcher = FusedDispatcher(transport(kind), *sizes)
        gather_counts = functools.partial(library.gather_counts, transport(kind))
    elif kind.startswith("hierarchical"):
        inside, between = host_groups()
        of_host = sizes[0] * case.expert_tp_size // HOSTS, case.top_k * case.expert_tp_size
        inner = RaggedDispatcher(inside, *of_host) if kind.endswith("ragged") else FusedDispatcher(transport("host"), *of_host)
        dispatcher = HierarchicalDispatcher(between, RANKS_PER_HOST, inside.rank(), inner, *sizes)
    else:
        dispatcher = {"ragged": RaggedDispatcher, "bounded": BoundedDispatcher}[kind](world, *sizes)
    if not case.slots:
        return dispatcher
    ranks = world.size() // case.expert_tp_size
    placement = LayerPlacement(np.array(case.slots), ranks, np.array(NODES[ranks]))
    return PlacedDispatcher(dispatcher, placement, world.rank(), case.expert_tp_size, gather_counts, torch.device("cpu"))


def expert(e: int, x, probs, shard: int = 0, shards: int = 1):
    """Logical expert e: a fixed elementwise function that differs between experts; a shard gives its part of the output."""
    scale = torch.cos(torch.arange(x.shape[1], dtype=torch.float32) + e)
    part = 1.0 / shards if shards > 1 else 1.0
    return ((torch.tanh(x.float()) * scale + x.float()) * part * probs[:, None]).to(x.dtype)


def there_and_back(dispatcher: Dispatcher, case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Everything that a dispatcher gives for one rank's inputs: dispatch, experts, combine, backward."""
    rank = dist.get_rank()
    x, probs, routing_map = make_inputs(case, seed)
    rows, counts, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
    assert rows.shape == (int(counts.sum()), case.hidden) and row_probs.shape == rows.shape[:1]
    block = 0 if isinstance(dispatcher, LocalDispatcher) else rank // case.expert_tp_size
    held = range(block * len(counts), (block + 1) * len(counts))
    logical = [case.slots[slot] for slot in held] if case.slots else held
    per_expert = zip(logical, rows.split(counts.tolist()), row_probs.split(counts.tolist()), strict=True)
    outputs = [expert(e, xs, ps, rank % case.expert_tp_size, case.expert_tp_size) for e, xs, ps in per_expert]
    y = dispatcher.combine(torch.cat(outputs), metadata)
    (y * torch.linspace(0.5, 1.5, case.hidden).to(case.dtype)).sum().backward()
    found = {"rows": rows, "counts": counts, "row_probs": row_probs, "y": y, "grad_x": x.grad, "grad_probs": probs.grad}
    return {name: tensor.detach() for name, tensor in found.items()}


def all_experts_at_hand(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """y and gradients in float64."""
    x, probs, routing_map = make_inputs(case, seed)
    x, probs = x.detach().double().requires_grad_(), probs.detach().double().requires_grad_()
    y = torch.zeros_like(x)
    for e in range(case.experts):
        tokens = routing_map[:, e].nonzero()[:, 0]
        scale = torch.cos(torch.arange(case.hidden, dtype=torch.float32) + e).double()
        y = y.index_add(0, tokens, (torch.tanh(x[tokens]) * scale + x[tokens]) * probs[tokens, e, None])
    (y * torch.linspace(0.5, 1.5, case.hidden).to(case.dtype).double()).sum().backward()
    return {"y": y.detach(), "grad_x": x.grad, "grad_probs": probs.grad * routing_map}


def relative_error(a, b) -> float:
    if b.numel() == 0:
        return 0.0 if a.numel() == 0 else float("inf")
    return float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _run_cases(kind: str, cases: dict[str, Case]) -> dict[str, tuple]:
    """On each rank, for each case: the largest relative errors, the rows of this rank's experts, and its tokens of all experts."""
    results, rank = {}, dist.get_rank()
    for name, case in cases.items():
        found, wanted = there_and_back(make_dispatcher(kind, case), case, rank), all_experts_at_hand(case, rank)
        routing_map = make_inputs(case, rank)[2]
        found["grad_probs"] *= routing_map
        errors = {of: relative_error(found[of], wanted[of]) for of in wanted}
        results[name] = errors, found["counts"].tolist(), routing_map.sum(0).tolist()
    return results


def check_cases(world_size: int, kind: str, cases: dict[str, Case]) -> None:
    """Outputs and gradients are those of all experts at hand; each slot gets what the planner's split gives it."""
    results = pool(world_size).run(_run_cases, kind, cases)
    for name, case in cases.items():
        for rank, result in enumerate(results):
            wrong = {of: error for of, error in result[name][0].items() if not error <= case.tolerance}
            assert not wrong, f"{name}, rank {rank}: relative errors {wrong}"
        tokens, counts = ([result[name][i] for result in results] for i in (1, 2))
        if kind == "local":
            assert tokens == counts, name
        elif kind != "padded":
            ranks = world_size // case.expert_tp_size
            counts_GE = np.array(counts).reshape(ranks, case.expert_tp_size, -1).sum(1)
            slots = np.array(case.slots or range(case.experts))
            tokens_P = split_tokens(counts_GE, slots, ranks, np.array(NODES[ranks])).sum(0)
            assert tokens == tokens_P.reshape(ranks, -1).repeat(case.expert_tp_size, axis=0).tolist(), name
