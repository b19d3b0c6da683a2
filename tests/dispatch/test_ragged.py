"""ragged_all_to_all against its twin, on 2 and 4 ranks."""

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.ragged import naming_failure, ragged_all_to_all
from megatron_scalemoe.ops.wire import WireMeter
from tests.rank_pool import RankFailed, pool


def random_splits(seed: int, size: int) -> torch.Tensor:
    """int [from, to], with many zeros; the same on every rank."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 6, (size, size), generator=g) * (torch.rand(size, size, generator=g) > 0.4)


def exchange(dtype: torch.dtype) -> None:
    """Rows of several shapes there, and as their own gradients back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for seed, trailing in enumerate([(), (5,), (3, 2), (4,)]):
        splits = random_splits(seed, size)
        inputs, outputs = splits[rank].tolist(), splits[:, rank].tolist()
        x = (torch.randn(sum(inputs), *trailing) * 9).to(dtype)
        if trailing == (4,):
            x = x.T.contiguous().T
        everyone: list = [None] * size
        dist.all_gather_object(everyone, x)
        expected = torch.cat([rows.split(splits[source].tolist())[rank] for source, rows in enumerate(everyone)])
        y = ragged_all_to_all(x.requires_grad_(dtype.is_floating_point), inputs, outputs, dist.group.WORLD)
        assert y.dtype == dtype
        assert torch.equal(y.detach(), expected)
        if dtype.is_floating_point:
            y.backward(y.detach())  # the gradient that makes the way back is the data itself
            assert torch.equal(x.grad, x.detach())


@pytest.mark.parametrize(("world_size", "dtype"), [(2, torch.float32), (4, torch.bfloat16), (2, torch.int64)])
def test_against_twin(world_size, dtype):
    pool(world_size).run(exchange, dtype)


def nothing_at_all() -> int:
    x = torch.zeros(0, 4, requires_grad=True)
    y = ragged_all_to_all(x, [0] * dist.get_world_size(), [0] * dist.get_world_size(), dist.group.WORLD)
    y.sum().backward()
    return y.shape[0] + x.grad.shape[0]


def test_no_rows():
    assert pool(4).run(nothing_at_all) == [0, 0, 0, 0]


def wrong_splits() -> str:
    try:
        ragged_all_to_all(torch.zeros(3, 2), [1, 1], [1, 1], dist.group.WORLD)
    except ScaleMoEError as error:
        return str(error)
    return ""


def test_splits_that_do_not_fit_are_refused_before_any_communication():
    assert all("3 rows" in message for message in pool(2).run(wrong_splits))


def wrong_use(kind: str) -> str:
    """What a program is told that gives the dispatcher something else; no rank communicates."""
    x, probs, chosen = torch.zeros(4, 3), torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)
    try:
        dispatcher = RaggedDispatcher(dist.group.WORLD, 7 if kind == "experts" else 8, 8)
        if kind == "rows":
            rows, *_, metadata = dispatcher.dispatch(x, probs, chosen)
            dispatcher.combine(rows[1:], metadata)
        given = {
            "x": (x[None], probs, chosen),
            "probs": (x, probs[:, 1:], chosen),
            "map": (x, probs, probs),
            "chosen": (x, probs, chosen[:, :2]),
        }
        dispatcher.dispatch(*given[kind])
    except ScaleMoEError as error:
        return error.problem
    return ""


@pytest.mark.parametrize("kind", ["experts", "rows", "x", "probs", "map", "chosen"])
def test_what_does_not_fit_the_dispatcher_is_a_user_error(kind):
    assert all(pool(2).run(wrong_use, kind))


def failing_alone(kind: str) -> str:
    """What a rank is told whose own fault keeps it from a collective that needs no other rank."""
    try:
        with naming_failure("exchange", dist.group.WORLD):
            if kind == "memory":
                torch.empty(1 << 50)
            elif kind == "shape":
                dist.all_to_all_single(torch.zeros(3), torch.zeros(2), [1], [1])
            else:
                dist.all_reduce(torch.zeros(2, dtype=torch.int16))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("kind", ["memory", "shape", "dtype"])
def test_a_rank_with_a_fault_of_its_own_blames_no_other(kind):
    [said] = pool(1).run(failing_alone, kind)
    assert said and not said.startswith("ScaleMoEError")


def count_bytes() -> int:
    rank = dist.get_rank()
    x = torch.ones(5, 4, requires_grad=True)  # 16 bytes a row; 2 rows to rank 0, 3 to rank 1
    with WireMeter() as meter:
        y = ragged_all_to_all(x, [2, 3], [2, 2] if rank == 0 else [3, 3], dist.group.WORLD)
        y.sum().backward()
    return meter.bytes_out


def test_wire_meter_counts_what_leaves_the_rank_in_both_directions():
    # rank 0 sends 3 rows and the gradients of 2; rank 1 sends 2 rows and the gradients of 3
    assert pool(2).run(count_bytes) == [5 * 16, 5 * 16]


def gives_up() -> None:
    raise ValueError("this rank gives up")


def test_a_failing_rank_fails_the_task_with_its_own_message():
    with pytest.raises(RankFailed, match="this rank gives up"):
        pool(1).run(gives_up)
