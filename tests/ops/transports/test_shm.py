"""The shared-memory transport: every op against plain indexing, and what becomes of errors.

SCALEMOE_SHM_CASES=10000 runs that many random cases in place of the suite's.
"""

import os
import random
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops import native
from megatron_scalemoe.ops.transports import shm, shm_memory
from tests.ops.transports.exchange_cases import Case, differing, expected_outputs, make_inputs, run_operations
from tests.rank_pool import pool

pytestmark = pytest.mark.skipif(native.cpu() is None, reason=str(native.why_not("cpu")))
CASES = int(os.environ.get("SCALEMOE_SHM_CASES", "300"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TIMEOUT_S = 20.0
_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def group_of(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """Collective over all ranks of the pool, like `new_group`; made once."""
    if ranks not in _groups:
        _groups[ranks] = dist.new_group(ranks)
    return _groups[ranks]


def open_world(timeout_s: float = TIMEOUT_S) -> shm.ShmTransport:
    return shm.open_shm(dist.group.WORLD, timeout_s)


def error_of(fn, *args) -> str:
    """The message of the `ScaleMoEError` that it raises, or ''."""
    try:
        fn(*args)
    except ScaleMoEError as error:
        return str(error)
    return ""


def shared_memory() -> list[str]:
    """This process's mappings and descriptors of the transport's memory."""
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if "memfd:scalemoe" in line]
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return mapped + [link for link in links if os.path.exists(link) and "memfd:scalemoe" in os.readlink(link)]


# --- results ---


def random_case(seed: int, ranks: int) -> Case:
    """Mostly small; one in a hundred is larger than the smallest half."""
    draw = random.Random(seed)
    num_local = draw.choice((1, 1, 2, 3, 4, 8))
    most, hidden = (700, draw.choice((1024, 1031))) if draw.random() < 0.01 else (draw.choice((1, 7, 40)), draw.randint(1, 70))
    return Case(
        ranks=ranks,
        top_k=min(draw.choice((1, 2, 2, 3, 8)), num_local * ranks),
        num_local=num_local,
        tokens=tuple(draw.choice((0, most, draw.randint(0, most))) for _ in range(ranks)),
        columns=hidden,
        dtype=draw.choice(DTYPES),
        probs_dtype=draw.choice(DTYPES),
        alignment=draw.choice((1, 1, 1, 2, 16)),
        wanted=draw.choice((0.0, 0.7, 1.0, 8.0)),
        skew=draw.choice((0.0, 1.0, 4.0)),
    )


def check_case(transport: shm.ShmTransport, case: Case, seed: int = 0) -> None:
    """All five ops of one case, bit for bit (but for the sign of zeros)."""
    ranks = [make_inputs(case, rank, seed) for rank in range(case.ranks)]
    rank = transport.arena.rank
    found = run_operations(transport, ranks[rank], case)
    expected = expected_outputs(ranks, case)[rank]
    assert len(found.rows) == len(expected.rows), case
    assert differing(found, expected) == [], case


def run_random_cases(size: int, count: int) -> int:
    """On each group of `size` ranks that the pool has room for, other cases. Returns how many this rank took part in."""
    world = dist.get_world_size()
    teams = [tuple(range(first, first + size)) for first in range(0, world - size + 1, size)]
    groups = {team: group_of(team) for team in teams}
    for number, team in enumerate(teams):
        if dist.get_rank() in team:
            transport = shm.open_shm(groups[team], TIMEOUT_S)
            for seed in range(number, count, len(teams)):
                check_case(transport, random_case(size * 1_000_000 + seed, size), seed)
            transport.close()
            return len(range(number, count, len(teams)))
    return 0


@pytest.mark.parametrize(("size", "share"), [(2, 0.5), (3, 0.25), (4, 0.25)])
def test_random_cases(size, share):
    count = round(CASES * share)
    assert sum(pool(4).run(run_random_cases, size, count)) == count * size


def run_threaded() -> bool:
    """A case large enough for every loop over rows to use several threads."""
    case = Case(tokens=(3000, 2500), columns=1024, alignment=16, skew=1.0, wanted=2.0)
    torch.set_num_threads(3)
    try:
        with open_world() as transport:
            check_case(transport, case)
    finally:
        torch.set_num_threads(1)
    return True


def test_several_threads():
    assert all(pool(2).run(run_threaded))


def run_growing() -> int:
    """Halves that grow again and again, one rank's at a time; how many mappings there are in the end."""
    rank = dist.get_rank()
    with open_world() as transport:
        for step in range(12):
            tokens = 300 * (step + 1) if step % 2 == rank else 5
            x = torch.arange(tokens * 512).view(tokens, 512).float()
            experts = torch.full((tokens, 1), 1 - rank, dtype=torch.int32)
            rows, *_, map = transport.dispatch(x, experts, torch.ones(tokens, 1), 1, 1)
            assert torch.equal(transport.combine(rows * 2, map, experts, 1), x * 2)
        return len(shared_memory())


def test_growing_leaves_no_old_memory_behind():
    # control, and two halves of two ranks; no descriptor
    assert pool(2).run(run_growing) == [5, 5]


def run_closing() -> list[str]:
    with open_world() as transport:
        transport.gather_counts(torch.tensor([1]))
        assert shared_memory()
    assert "is closed" in error_of(transport.gather_counts, torch.tensor([1]))
    transport.close()
    lost = open_world()
    del lost
    dist.barrier()
    return shared_memory()


def test_nothing_is_left_after_close():
    before = set(os.listdir("/dev/shm"))
    assert pool(2).run(run_closing) == [[], []]
    assert set(os.listdir("/dev/shm")) == before


def run_forking() -> int:
    """A forked child has nothing mapped, cannot use the transport, and its end disturbs nobody."""
    with open_world() as transport:
        child = os.fork()
        if child == 0:
            refused = "belongs to the process that opened it" in error_of(transport.gather_counts, torch.tensor([1]))
            clean = not shared_memory()
            transport.close()
            os._exit(0 if refused and clean else 1)
        status = os.waitpid(child, 0)[1]
        transport.gather_counts(torch.tensor([1]))
        return status


def test_a_forked_child_is_no_rank():
    assert pool(2).run(run_forking) == [0, 0]


# --- errors ---


def call_wrongly(what: str, transport: shm.ShmTransport) -> None:
    """Ops in which rank 1 does not do as the others; on rank 0 the first or second call must fail."""
    wrong = dist.get_rank() == 1
    x, experts, probs = torch.zeros(3, 4), torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.zeros(3, 2)
    if wrong and what == "experts":
        transport.dispatch(x, torch.tensor([[1, 0]] * 3, dtype=torch.int32), probs, 1, 1)
    if wrong and what == "op":
        transport.gather_counts(torch.tensor([1]))
    if wrong and what == "dtype":
        transport.dispatch(x.int().float().bfloat16(), experts, probs, 1, 1)
    if wrong and what == "columns":
        transport.dispatch(x, experts[:, :1], probs[:, :1], 1, 1)
    if wrong and what == "leaves":
        transport.close()
    if wrong and what == "hangs":
        time.sleep(0.7)
    rows, *_, map = transport.dispatch(x, experts, probs, 1, 1)
    if wrong and what == "other map":
        map[-1] = 1000
        transport.combine(rows, map, experts, 1)
    if wrong and what == "counts":
        transport.gather_counts(torch.zeros(5, dtype=torch.int64))
    transport.gather_counts(torch.zeros(4, dtype=torch.int64))


def run_wrongly(what: str) -> tuple[str, str, float]:
    """The error, that of every later call, and how long the error took."""
    with open_world(0.3 if what == "hangs" else TIMEOUT_S) as transport:
        dist.barrier()
        start = time.monotonic()
        error = error_of(call_wrongly, what, transport)
        return error, error_of(transport.gather_counts, torch.tensor([1])), time.monotonic() - start


WRONG = {
    "experts": "rank 1 raised an error of its own",
    "other map": "rank 1 raised an error of its own",
    "op": "another op",
    "dtype": "bytes of a row differs",
    "columns": "columns differs",
    "counts": "columns differs",
    "leaves": "rank 1 closed its transport",
    "hangs": "rank 1 did not come to dispatch within 0.3 s",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_one_rank_does_wrong_is_an_error_everywhere(what):
    (error, later, time_s), (own_error, own_later, _) = pool(2).run(run_wrongly, what)
    assert WRONG[what] in error
    assert "rank 1" in error or what in ("op", "dtype", "columns", "counts")  # of two that differ either may be wrong
    assert later == error
    assert own_error and own_later
    assert time_s < 2


BAD_ARGUMENTS = (
    ((torch.zeros(3, 4, dtype=torch.int32),), "x must be a CPU tensor (3, 4) of torch.float32 or"),
    ((torch.zeros(2, 4),), "x must be a CPU tensor (3, 4)"),
    ((torch.zeros(3),), "two dimensions"),
    ((torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 2)), "probs must be a CPU tensor (3, 1)"),
    ((torch.zeros(3, 4), torch.full((3, 1), 2, dtype=torch.int32)), "ascending order"),
    ((torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 1), 1, 0), "alignment"),
)


def run_bad_arguments() -> list[str]:
    """The error of each of the BAD_ARGUMENTS of a dispatch."""
    defaults, errors = (torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, 1), 1, 1), []
    for given, _ in BAD_ARGUMENTS:
        with open_world() as transport:
            errors.append(error_of(transport.dispatch, *given, *defaults[len(given) :]))
    return errors


def test_bad_arguments():
    for errors in pool(2).run(run_bad_arguments):
        for error, (_, message) in zip(errors, BAD_ARGUMENTS, strict=True):
            assert message in error


def run_without_memory() -> tuple[str, str]:
    """Rank 1 may have no file beyond 4 MB, and so no larger half."""
    with open_world() as transport:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, limits[1]))
        try:
            small, large = (torch.zeros(n, dtype=torch.int64) for n in (100, 1 << 20))
            return error_of(transport.gather_counts, small), error_of(transport.gather_counts, large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)


def test_a_rank_without_memory_is_an_error_everywhere():
    for small, large in pool(2).run(run_without_memory):
        assert not small
        assert "rank 1 could not get shared memory: File too large" in large


# --- ranks that cannot share memory ---


def run_apart(what: str) -> tuple[bool, str, list[str]]:
    """open_arena where memory cannot be had, or not be opened."""

    def exchange(mine):
        if isinstance(mine, dict) and dist.get_rank() == 1:
            mine |= {"problem": "no shared memory"} if what == "no shared memory" else {}
        if isinstance(mine, dict) and dist.get_rank() == 0:
            mine |= {"fd": 12345} if what == "could not be opened" else {}
            mine |= {"token": [1, 2]} if what == "Bad file descriptor" else {}
        gathered: list = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        return gathered

    try:
        shm_memory.open_arena(dist.get_rank(), range(dist.get_world_size()), exchange, TIMEOUT_S).close()
    except ScaleMoEError as error:
        return isinstance(error, shm_memory.ShmUnavailable), str(error), shared_memory()
    return False, "", []


@pytest.mark.parametrize("what", ["no shared memory", "could not be opened", "Bad file descriptor"])
def test_ranks_that_cannot_share_memory_all_learn_why(what):
    results = pool(2).run(run_apart, what)
    assert results[0] == results[1]
    unavailable, message, left = results[0]
    assert unavailable
    assert what in message
    assert not left
