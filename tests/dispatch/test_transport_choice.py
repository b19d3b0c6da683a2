"""Which transport a dispatch group takes: all its ranks decide the same, and the first says what and why."""

import contextlib
import dataclasses
import functools
import io
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.dispatch.transport_choice import CallSizes, Plan, RankFacts, limits_of, plan_of, why_not_cuda
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.transports.cuda import Limits
from tests.rank_pool import pool

CALL = CallSizes(tokens=10, hidden=8, dtype=torch.bfloat16, columns=2)


def facts(*hosts: str, lacking: tuple[int, ...] = ()) -> list[RankFacts]:
    return [RankFacts(rank, host, "no compiler" if rank in lacking else None) for rank, host in enumerate(hosts)]


@pytest.mark.parametrize(
    ("hosts", "plan"),
    [
        ("aa", Plan(1, 2)),
        ("aabb", Plan(2, 2)),
        ("aaabbbccc", Plan(3, 3)),
        ("ab", Plan(why_not="no two of the ranks share a host")),
        ("abab", Plan(why_not="2 hosts do not have equally many of the ranks, host by host")),
        ("aaab", Plan(why_not="2 hosts do not have equally many of the ranks, host by host")),
        ("aab", Plan(why_not="2 hosts do not have equally many of the ranks, host by host")),
    ],
)
def test_plan_of_hosts(hosts, plan):
    assert plan_of(facts(*hosts)) == plan


def test_one_rank_without_the_library_decides():
    plan = plan_of(facts("a", "a", "a", lacking=(1,)))
    assert plan.lacks
    assert plan.why_not == "no native library on rank 1: no compiler"


def test_room_on_cuda():
    ranks = [CALL, dataclasses.replace(CALL, tokens=12)]
    assert limits_of(ranks, Plan(1, 2)) == Limits(12, 2, 16, None)
    bounded = [dataclasses.replace(call, max_rows_factor=1.5) for call in ranks]
    assert limits_of(bounded, Plan(2, 1)) == Limits(24, 2, 16, 36)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "do not take torch.float64"),
        ({"hidden": 7}, "rows of a multiple of 16 bytes, not of 14"),
        ({"columns": 64}, "at most 32 experts per token"),
        ({"varying": True}, "--variable-seq-lengths"),
    ],
)
def test_what_cuda_kernels_cannot_do(changes, problem):
    found = why_not_cuda(dataclasses.replace(CALL, **changes), Plan(1, 8))
    assert found is None if problem is None else problem in found


def choose(asked: list[str], *, hosts: int = 1, lacking: tuple[int, ...] = (), failing: tuple[int, ...] = ()) -> dict:
    """On each rank, for a fresh group of all: the channel for each of `asked`, or the error, and what was printed.

    lacking: ranks whose native library is not there. failing: ranks whose shared memory cannot be opened.
    """
    import tests.mcore.megatron_case  # noqa: F401 - installs the CPU ranks
    from megatron_scalemoe.dispatch import transport_choice as transports
    from megatron_scalemoe.ops.transports.registry import registered

    rank, group, printed, found = dist.get_rank(), dist.new_group(), io.StringIO(), []
    closed = []

    def open_shm(inside, timeout_s):
        if rank in failing:
            raise transports.ShmUnavailable("too little memory")
        transport = real_open_shm(inside, timeout_s)
        close = transport.close
        transport.close = lambda: (closed.append(True), close())
        return transport

    real_open_shm = transports.open_shm
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(transports, "open_shm", open_shm))
        if hosts > 1:
            stack.enter_context(mock.patch.object(transports, "_host", return_value=f"host {rank * hosts // group.size()}"))
        if rank in lacking:
            stack.enter_context(mock.patch.object(transports.native, "why_not", return_value="no compiler"))
        for name in asked:
            try:
                transports.check_transport(group, name)
                channel = transports.channel_of(group, name, CALL)
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


@pytest.mark.parametrize("asked", ["auto", "shm"])
def test_several_hosts_take_two_hops(asked):
    line = " scalemoe: ranks 0-3 dispatch through shared memory inside each of 2 hosts, by collectives between them\n"
    check(on_ranks(4, [asked], hosts=2), [("shm", 2, 2)], line)


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
        assert result["printed"] == ""


@pytest.mark.parametrize("asked", ["auto", "shm"])
def test_too_little_memory_on_one_host_leads_to_collectives_on_all(asked):
    results = on_ranks(4, [asked], hosts=2, failing=(2, 3))
    check(results, [("collective", None, None)], " scalemoe: ranks 0-3 dispatch by collectives: too little memory\n")
    assert [result["closed"] for result in results] == [[True], [True], [], []]


def open_on_cuda(asked: str, hidden: int, tokens: list[int]) -> tuple[str, object, str]:
    """What is opened on a pretended GPU, for what limits, and what is said."""
    import tests.mcore.megatron_case  # noqa: F401 - installs the CPU ranks
    from megatron_scalemoe.dispatch import transport_choice as transports
    from megatron_scalemoe.ops.reference import ReferenceTransport

    group, printed, opened = dist.new_group(), io.StringIO(), []

    def open_cuda(group, limits, timeout_s):
        opened.append(limits)
        transport = ReferenceTransport(group)
        transport.name = "cuda"
        return transport

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(mock.patch.object(transports, "_device", return_value=torch.device("cuda")))
        stack.enter_context(mock.patch.object(transports.native, "why_not", return_value=None))
        stack.enter_context(mock.patch.object(transports, "open_cuda", open_cuda))
        transports.check_transport(group, asked)
        channel = transports.channel_of(group, asked, dataclasses.replace(CALL, hidden=hidden, tokens=tokens[dist.get_rank()]))
    return channel.name, opened, printed.getvalue()


def test_gpus_of_one_host():
    results = pool(2).run(open_on_cuda, "cuda", 8, [3, 5])
    assert [result[:2] for result in results] == [("cuda", [Limits(5, 2, 16, None)])] * 2
    assert results[0][2] == " scalemoe: ranks 0-1 dispatch through CUDA kernels: they share a host\n"


def test_nobody_gets_cuda_kernels_unasked():
    results = pool(2).run(open_on_cuda, "auto", 8, [3, 5])
    assert [result[:2] for result in results] == [("collective", [])] * 2
    assert "by collectives: the CUDA kernels have not been tried on a GPU yet" in results[0][2]


def test_gpus_with_rows_that_the_kernels_do_not_take():
    results = pool(2).run(open_on_cuda, "cuda", 7, [3, 5])
    assert [result[:2] for result in results] == [("collective", [])] * 2
    assert "by collectives: the CUDA kernels take rows of a multiple of 16 bytes, not of 14" in results[0][2]


def dispatchers_of_layers(ep: int, **config) -> list:
    """Class names of the dispatchers of a layer, without and under a placement, and whether two layers have one transport."""
    import numpy as np

    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.dispatch.placed import LayerPlacement
    from tests.mcore.megatron_case import LayerCase, make_layer

    case, x = LayerCase(ep=ep, scalemoe=ScaleMoEConfig(**config)), torch.randn(4, 1, 16)
    layers = [make_layer(case, "scalemoe") for _ in range(2)]
    for layer in layers:
        layer(x)
    first, second = (layer.token_dispatcher for layer in layers)
    found = [type(first.dispatcher).__name__, getattr(first.dispatcher, "transport", None) == getattr(second.dispatcher, "transport", None)]
    if ep > 1 and config.get("dispatch") != "padded":
        first.set_placement(LayerPlacement(np.arange(8), ep, np.zeros(ep, dtype=np.int64)))
        layers[0](x)
        found.append(type(first.dispatcher._inner).__name__)
    return found


@pytest.mark.parametrize(
    ("ep", "config", "expected"),
    [
        (2, {}, ["FusedDispatcher", True, "FusedDispatcher"]),
        (2, {"transport": "shm"}, ["FusedDispatcher", True, "FusedDispatcher"]),
        (2, {"transport": "collective"}, ["RaggedDispatcher", True, "RaggedDispatcher"]),
        (2, {"dispatch": "padded", "transport": "shm"}, ["PaddedDispatcher", True]),
        (1, {"transport": "shm"}, ["LocalDispatcher", True]),
    ],
)
def test_dispatchers_of_layers(ep, config, expected):
    assert pool(2).run(functools.partial(dispatchers_of_layers, **config), ep) == [expected] * 2


def measured_over_transports(spoil: bool) -> tuple[bool, dict[str, int], float]:
    """As `scalemoe bench dispatch` does it: same bits, bytes by collectives, largest error. spoil: one transport sums with an error."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_scalemoe.bench.measure import measure_dispatchers, same_bits
    from megatron_scalemoe.bench.routed_tokens import make_routed_tokens
    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.mcore.stock import make_dispatchers
    from tests.mcore.megatron_case import LayerCase, initialize, transformer_config

    initialize(tp=1, ep=2, expert_tp=1)
    names = ["alltoall", "scalemoe collective", "scalemoe shm"]
    config = transformer_config(LayerCase(ep=2), "alltoall")
    dispatchers = make_dispatchers(names, config, ScaleMoEConfig(), get_default_pg_collection())
    routed = [make_routed_tokens(32, 16, 8, 2, 1.0, torch.float32, dist.get_rank(), torch.device("cpu"))]
    measured = measure_dispatchers(dispatchers, routed, iters=1, warmup=1)
    if spoil and dist.get_rank() == 1:
        shm = dispatchers["scalemoe shm"].dispatcher
        shm.restore = lambda x, metadata: x * (1 + 2**-23)
    same = same_bits([dispatchers[name] for name in names[1:]], routed)
    errors = [measurement.max_rel_error for measurement in measured.values()]
    return same, {name: measured[name].bytes_out for name in names}, max(errors)


@pytest.mark.parametrize("spoil", [False, True])
def test_transports_are_compared_bit_for_bit(spoil):
    for same, bytes_out, error in pool(2).run(measured_over_transports, spoil):
        assert same != spoil
        assert error <= 1e-6
        assert bytes_out["scalemoe shm"] == 0 < bytes_out["scalemoe collective"] < bytes_out["alltoall"]


def layer_over_two_hosts(placed: bool) -> tuple[str, float]:
    """Class name of a layer's dispatcher on two pretended hosts of two, and the largest difference to stock Megatron's layer."""
    import numpy as np

    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.dispatch import transport_choice as transports
    from megatron_scalemoe.dispatch.placed import LayerPlacement
    from tests.mcore import megatron_case
    from tests.mcore.test_parity import _difference

    case = megatron_case.LayerCase(ep=4, scalemoe=ScaleMoEConfig(transport="shm"))
    make_layer, made = megatron_case.make_layer, []

    def make_placed(case, kind):
        layer = make_layer(case, kind)
        if placed:
            layer.token_dispatcher.set_placement(LayerPlacement(np.arange(8), 4, np.array([0, 0, 1, 1])))
        made.append(layer.token_dispatcher)
        return layer

    stock = megatron_case.run_layer(case, "alltoall")
    with contextlib.ExitStack() as stack:
        for known in (transports._plans, transports._channels):
            stack.enter_context(mock.patch.dict(known, clear=True))
        stack.enter_context(mock.patch.object(transports, "_host", return_value=f"host {dist.get_rank() // 2}"))
        stack.enter_context(mock.patch.object(megatron_case, "make_layer", make_placed))
        ours = megatron_case.run_layer(case, "scalemoe")
    return type(made[0].dispatcher).__name__, max(_difference(ours[name], stock[name]) for name in stock)


@pytest.mark.parametrize(("placed", "expected"), [(False, "HierarchicalDispatcher"), (True, "PlacedDispatcher")])
def test_a_layer_over_two_hosts(placed, expected):
    for name, difference in pool(4).run(layer_over_two_hosts, placed):
        assert name == expected
        assert difference <= 1e-6
