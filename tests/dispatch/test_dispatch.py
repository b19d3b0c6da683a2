"""Every dispatcher against the all-experts-at-hand reference: outputs, gradients, counts, order and bytes."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.wire import WireMeter
from tests.dispatch.cases import CASES, HOSTS, RANKS_PER_HOST, Case, check_cases, make_dispatcher, make_inputs, random_slots, relative_error
from tests.rank_pool import pool

KINDS = [
    *((ranks, kind) for kind in ("ragged", "padded") for ranks in (2, 4)),
    (2, "local"),
    (4, "bounded"),
    (4, "hierarchical ragged"),
    (4, "hierarchical shm"),
]


@pytest.mark.parametrize(("world_size", "kind"), KINDS)
def test_as_all_experts_at_hand(world_size, kind):
    check_cases(world_size, kind, CASES)


@pytest.mark.parametrize("kind", ["ragged", "hierarchical ragged", "hierarchical shm"])
def test_tensor_parallel_experts(kind):
    check_cases(4, kind, {f"of {size}": Case(expert_tp_size=size, top_k=3) for size in (2, 4)})


@pytest.mark.parametrize(("world_size", "replicas_per_rank"), [(2, 1), (4, 0), (4, 3)])
def test_any_placement(world_size, replicas_per_rank):
    cases = {}
    for name, case in CASES.items():
        slots = random_slots(case.experts, world_size, replicas_per_rank, seed=len(name) + replicas_per_rank)
        cases[name] = dataclasses.replace(case, slots=slots)
    check_cases(world_size, "ragged", cases)


@pytest.mark.parametrize("kind", ["ragged", "hierarchical ragged", "hierarchical shm"])
def test_placements_of_many_copies_and_of_tensor_parallel_experts(kind):
    copies = Case(slots=random_slots(8, 4, 6, seed=0), skew=1.5)
    sharded = Case(expert_tp_size=2, top_k=3, slots=random_slots(8, 2, 2, seed=3))
    check_cases(4, kind, {"every expert everywhere": copies, "tensor-parallel": sharded})


def several_in_flight(kind: str, order: list[int]) -> list[bool]:
    """Three dispatches of one dispatcher, stage by stage interleaved: is each the same as alone, forward and backward?"""
    dispatcher = make_dispatcher(kind, Case())
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


@pytest.mark.parametrize("kind", ["ragged", "shm"])
def test_several_dispatches_may_be_in_flight(kind):
    assert pool(2).run(several_in_flight, kind, [2, 0, 1]) == [[True] * 3] * 2


def rows_of_first_expert(kind: str) -> tuple[list, list]:
    """Rows of this rank's first expert, which carry (source rank, token) in their values."""
    rank, tokens = dist.get_rank(), 3
    x = torch.stack([torch.full((tokens,), float(rank)), torch.arange(tokens).float()], 1)
    routing_map = torch.ones(tokens, 8, dtype=torch.bool)
    routing_map[:, 1::2] = False
    rows, tokens_per_expert, _, _ = make_dispatcher(kind, Case(top_k=4)).dispatch(x, routing_map.float(), routing_map)
    return rows[: tokens_per_expert[0]].tolist(), tokens_per_expert.tolist()


@pytest.mark.parametrize(
    ("kind", "sources"), [("ragged", [0, 1, 2, 3]), ("hierarchical ragged", [0, 2, 1, 3]), ("hierarchical shm", [0, 2, 1, 3])]
)
def test_rows_are_in_expert_source_token_order(kind, sources):
    """Over several hosts sources are in the order of their positions in their hosts, then of the hosts."""
    for rows, tokens_per_expert in pool(4).run(rows_of_first_expert, kind):
        assert rows == [[float(source), float(token)] for source in sources for token in range(3)]
        assert tokens_per_expert == [12, 0]


def traffic(kind: str, case: Case) -> dict[str, int]:
    """Bytes that left this rank by collectives, and the least that can; rows that it sent, by its own count and by the routing map.

    The least: one row per token and other rank, or other host for a dispatcher over several.
    """
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher, parts = make_dispatcher(kind, case), HOSTS if kind.startswith("hierarchical") else dist.get_world_size()
    with WireMeter() as meter:
        rows, _, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
        dispatched = meter.bytes_out
        y = dispatcher.combine(rows * row_probs[:, None], metadata)
        forward = meter.bytes_out
        y.sum().backward()
    goes_G = routing_map.unflatten(1, (parts, -1)).any(2).sum(0)
    stayed = int(goes_G[dist.get_rank() * parts // dist.get_world_size()])
    left = int(goes_G.sum()) - stayed
    sent = dispatcher.rows_sent(metadata)
    return {
        "dispatched": dispatched,
        "forward": forward,
        "backward": meter.bytes_out - forward,
        "least": left * case.hidden * case.dtype.itemsize,
        "sent": (int(sent.stayed), int(sent.left)),
        "wanted": (stayed, left),
    }


@pytest.mark.parametrize(
    ("world_size", "kind", "top_k", "dtype"),
    [(2, "ragged", 2, torch.float32), (4, "ragged", 8, torch.bfloat16), (4, "hierarchical shm", 2, torch.float32)],
)
def test_bytes_are_one_row_per_token_and_rank_plus_little(world_size, kind, top_k, dtype):
    """Inside a host rows go through shared memory, so that collectives carry the hop between hosts alone."""
    case = Case(tokens=256, hidden=1024, top_k=top_k, dtype=dtype, experts=32)
    results = pool(world_size).run(traffic, kind, case)
    for found in results:
        assert found["least"] < found["dispatched"] <= 1.03 * found["least"]
    assert sum(found["backward"] for found in results) <= sum(found["forward"] for found in results)


def rows_of_two_hops(kind: str, case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows that stayed and left by the dispatcher's count, and as the routing map says: to each other host, then to the others in it."""
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher = make_dispatcher(kind, case)
    sent = dispatcher.rows_sent(dispatcher.dispatch(x, probs, routing_map)[3])
    host, position = divmod(dist.get_rank(), RANKS_PER_HOST)
    goes_THP = routing_map.unflatten(1, (HOSTS, RANKS_PER_HOST, -1)).any(3)
    crossed = int(goes_THP.any(2).sum() - goes_THP[:, host].any(1).sum())
    passed_on = int(goes_THP.sum() - goes_THP[:, :, position].sum())  # by the ranks of this position, in the sum over all ranks
    return (int(sent.stayed), int(sent.left)), (int(goes_THP[:, host, position].sum()), crossed + passed_on)


@pytest.mark.parametrize("kind", ["hierarchical ragged", "hierarchical shm"])
def test_the_rows_of_both_hops_are_counted(kind):
    found = pool(4).run(rows_of_two_hops, kind, Case(top_k=3, drop_share=0.2))
    assert all(counted[0] == wanted[0] for counted, wanted in found)
    assert sum(counted[1] for counted, _ in found) == sum(wanted[1] for _, wanted in found)


@pytest.mark.parametrize("kind", ["ragged", "shm"])
def test_dispatchers_count_the_rows_that_they_send(kind):
    for case in (Case(top_k=3, drop_share=0.2), Case(top_k=2, slots=tuple(range(8)))):
        for found in pool(4).run(traffic, kind, case):
            assert found["sent"] == found["wanted"]


def capacity_factor_drops() -> tuple[int, float, tuple, int]:
    """With a capacity factor, the rows per expert, the error, what was sent, and how many of this rank's selections were kept."""
    case = Case(tokens=40, top_k=2, experts=4, skew=2.0)
    x, probs, routing_map = make_inputs(case, dist.get_rank())
    dispatcher = PaddedDispatcher(dist.group.WORLD, case.experts, case.top_k, capacity_factor=1.0)
    rows, tokens_per_expert, row_probs, metadata = dispatcher.dispatch(x, probs, routing_map)
    y = dispatcher.combine(rows * row_probs[:, None], metadata)
    kept = routing_map & (routing_map.cumsum(0) <= 20)
    error = relative_error(y, (x * (probs * kept).sum(1, keepdim=True)).double())
    return int(tokens_per_expert[0]), error, dataclasses.astuple(dispatcher.rows_sent(metadata)), int(kept.sum())


def test_padded_capacity_factor_keeps_the_first_tokens():
    # ceil(1.0 * 40 tokens * 2 / 4 experts) = 20 rows from each of 2 ranks
    for per_expert, error, sent, kept in pool(2).run(capacity_factor_drops):
        assert per_expert == 40
        assert error <= 1e-6
        assert kept < 80
        assert sent == (40, 40, 80 - kept)


def error_of_two_experts(kind: str) -> str:
    """What a dispatcher for top-1 says of a token with two experts of one rank."""
    routing_map = torch.tensor([[True, True, False, False]])
    try:
        make_dispatcher(kind, Case(experts=4, top_k=1)).prepare(torch.zeros(1, 2), routing_map.float(), routing_map)
    except ScaleMoEError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["ragged", "shm"])
def test_an_expert_is_never_dropped_silently(kind):
    assert all("a token with 2" in message for message in pool(2).run(error_of_two_experts, kind))
