"""Which transport a dispatch group takes: all its ranks decide the same, and the first says what and why."""

import contextlib
import dataclasses
import datetime
import functools
import io
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch import channels
from megatron_scalemoe.dispatch.channels import DispatchSizes, HostLayout, Peers, layout_of, limits_of, why_not_cuda
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.transports.cuda import Limits
from megatron_scalemoe.ops.transports.registry import registered
from tests.rank_pool import COLLECTIVE_TIMEOUT_S, pool

CALL = DispatchSizes(num_experts=8, max_experts_per_token=2, expert_tp_size=1, tokens=10, hidden=8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("hosts", "layout"),
    [
        ("aa", HostLayout(1, 2)),
        ("aaabbbccc", HostLayout(3, 3)),
        ("ab", HostLayout(why_not="no two of the ranks share a host")),
        ("abab", HostLayout(why_not="2 hosts do not have equally many of the ranks, host by host")),
        ("aab", HostLayout(why_not="2 hosts do not have equally many of the ranks, host by host")),
    ],
)
def test_layout_of_hosts(hosts, layout):
    assert layout_of(range(len(hosts)), hosts, [None] * len(hosts)) == layout


def test_room_on_cuda():
    assert limits_of(CALL, 12, HostLayout(1, 2), None) == Limits(12, 2, 16, None)
    sharded = dataclasses.replace(CALL, expert_tp_size=2)
    assert limits_of(sharded, 12, HostLayout(2, 1), 1.5) == Limits(24, 4, 16, 72)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "do not take torch.float64"),
        ({"hidden": 7}, "rows of a multiple of 16 bytes, not of 14"),
        ({"max_experts_per_token": 33}, "at most 32 experts per token"),
        ({"varying": True}, "--variable-seq-lengths"),
    ],
)
def test_what_cuda_kernels_cannot_do(changes, problem):
    found = why_not_cuda(dataclasses.replace(CALL, **changes), HostLayout(1, 8))
    assert found is None if problem is None else problem in found


def new_peers(hosts: int = 1, device: str = "cpu") -> Peers:
    """A fresh group of all ranks, which seem to be on so many hosts."""
    group = dist.new_group()
    host = f"host {group.rank() * hosts // group.size()}"
    return Peers(group, torch.device(device), host, datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))


def choose(asked: list[str], *, hosts: int = 1, lacking: tuple[int, ...] = (), failing: tuple[int, ...] = ()) -> dict:
    """On each rank, for a fresh group of all: the channel for each of `asked`, or the error, and what was printed.

    lacking: ranks whose native library is not there. failing: ranks whose shared memory cannot be opened.
    """
    peers, printed, found, closed = new_peers(hosts), io.StringIO(), [], []
    rank, real_open_shm = dist.get_rank(), channels.open_shm

    def open_shm(inside, timeout_s):
        if rank in failing:
            raise channels.ShmUnavailable("too little memory")
        transport = real_open_shm(inside, timeout_s)
        close = transport.close
        transport.close = lambda: (closed.append(True), close())
        return transport

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(channels, "open_shm", open_shm))
        if rank in lacking:
            stack.enter_context(mock.patch.object(channels.native, "why_not", return_value="no compiler"))
        for name in asked:
            try:
                channels.check_transport(peers, name)
                channel = channels.channel_of(peers, name, CALL)
                size = registered(channel.transport).group.size() if channel.name != "collective" else None
                found.append((channel.name, size, channel.between and channel.between.size()))
            except ScaleMoEError as error:
                found.append(str(error))
    return {"found": found, "printed": printed.getvalue(), "closed": closed}


def on_ranks(world_size: int, asked: list[str], **options) -> list[dict]:
    return pool(world_size).run(functools.partial(choose, **options), asked)


def check(results: list[dict], found: list, line: str) -> None:
    assert [result["found"] for result in results] == [found] * len(results)
    assert results[0]["printed"] == line
    assert not any(result["printed"] for result in results[1:])


def test_auto_takes_shared_memory_on_one_host_and_says_so_once():
    results = on_ranks(4, ["auto", "auto", "shm", "collective"])
    shm = ("shm", 4, None)
    check(results, [shm, shm, shm, ("collective", None, None)], " scalemoe: ranks 0-3 dispatch through shared memory: they share a host\n")


def test_several_hosts_take_two_hops():
    line = " scalemoe: ranks 0-3 dispatch through shared memory inside each of 2 hosts, by collectives between them\n"
    check(on_ranks(4, ["auto", "shm"], hosts=2), [("shm", 2, 2)] * 2, line)


def test_hosts_with_one_rank_each_take_collectives():
    line = " scalemoe: ranks 0-1 dispatch by collectives: no two of the ranks share a host\n"
    check(on_ranks(2, ["shm"], hosts=2), [("collective", None, None)], line)


def test_a_missing_library_is_an_error_only_if_asked_for():
    results = on_ranks(4, ["auto", "shm", "auto"], lacking=(2,))
    collective = ("collective", None, None)
    for result in results:
        assert [result["found"][0], result["found"][2]] == [collective, collective]
        assert "--scalemoe-transport shm needs our native library on every rank" in result["found"][1]
        assert "no native library on rank 2: no compiler" in result["found"][1]
    assert results[0]["printed"] == " scalemoe: ranks 0-3 dispatch by collectives: no native library on rank 2: no compiler\n"


def test_another_device_is_an_error():
    for result in on_ranks(2, ["cuda"]):
        assert "--scalemoe-transport cuda is for ranks on the GPU" in result["found"][0]


def test_too_little_memory_on_one_host_leads_to_collectives_on_all():
    results = on_ranks(4, ["shm"], hosts=2, failing=(2, 3))
    check(results, [("collective", None, None)], " scalemoe: ranks 0-3 dispatch by collectives: too little memory\n")
    assert [result["closed"] for result in results] == [[True], [True], [], []]


def open_on_cuda(asked: str, hidden: int) -> tuple[str, list, str]:
    """What is opened on a pretended GPU, for what limits, and what is said. Rank 1 has more tokens."""
    peers, printed, opened = new_peers(device="cuda"), io.StringIO(), []

    def open_cuda(group, limits, timeout_s):
        opened.append(limits)
        return types.SimpleNamespace(name="cuda", group=group)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(channels.native, "why_not", return_value=None))
        stack.enter_context(mock.patch.object(channels, "open_cuda", open_cuda))
        channels.check_transport(peers, asked)
        sizes = dataclasses.replace(CALL, hidden=hidden, tokens=3 + 2 * dist.get_rank())
        channel = channels.channel_of(peers, asked, sizes)
    return channel.name, opened, printed.getvalue()


@pytest.mark.parametrize(
    ("asked", "hidden", "expected", "said"),
    [
        ("cuda", 8, ("cuda", [Limits(5, 2, 16, None)]), "through CUDA kernels: they share a host"),
        ("auto", 8, ("collective", []), "by collectives: the CUDA kernels have not been tried on a GPU yet"),
        ("cuda", 7, ("collective", []), "by collectives: the CUDA kernels take rows of a multiple of 16 bytes, not of 14"),
    ],
)
def test_gpus_of_one_host(asked, hidden, expected, said):
    results = pool(2).run(open_on_cuda, asked, hidden)
    assert [result[:2] for result in results] == [expected] * 2
    assert said in results[0][2]
