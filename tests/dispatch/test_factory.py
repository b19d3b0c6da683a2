"""The dispatcher that is made of configuration, ranks, sizes and placement; and a Megatron layer over each."""

import datetime
import functools
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.dispatch import channels
from megatron_scalemoe.dispatch.channels import DispatchSizes, Peers
from megatron_scalemoe.dispatch.factory import make_dispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement
from tests.dispatch.cases import NODES, Case, make_inputs
from tests.rank_pool import COLLECTIVE_TIMEOUT_S, pool

SIZES = DispatchSizes(num_experts=8, max_experts_per_token=2, expert_tp_size=1, tokens=10, hidden=8, dtype=torch.float32)


@functools.cache
def peers(hosts: int) -> Peers:
    group = dist.new_group()
    host = f"host {group.rank() * hosts // group.size()}"
    return Peers(group, torch.device("cpu"), host, datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))


def made(config: dict, hosts: int) -> list:
    """Class names of two layers' dispatchers, which share a transport, and of the one inside a placed one, whose rows come back."""
    scalemoe, size = ScaleMoEConfig(**config), dist.get_world_size()
    first, second = (make_dispatcher(scalemoe, peers(hosts), SIZES) for _ in range(2))
    found = [type(first).__name__, getattr(first, "transport", None) == getattr(second, "transport", None)]
    if scalemoe.dispatch != "padded":
        slots_GL = np.column_stack([np.arange(8).reshape(size, -1), np.where(np.arange(size) == 0, 7, 0)])  # with a replica on each rank
        placed = make_dispatcher(scalemoe, peers(hosts), SIZES, LayerPlacement(slots_GL.reshape(-1), size, np.array(NODES[size])))
        x, probs, routing_map = make_inputs(Case(hidden=SIZES.hidden), dist.get_rank())
        rows, _, row_probs, metadata = placed.dispatch(x, probs, routing_map)
        y = placed.combine(rows * row_probs[:, None], metadata)
        found += [type(placed._inner).__name__, torch.allclose(y, x * probs.sum(1, keepdim=True))]
    return found


@pytest.mark.parametrize(
    ("ranks", "hosts", "config", "name"),
    [
        (2, 1, {}, "FusedDispatcher"),
        (2, 1, {"transport": "collective"}, "RaggedDispatcher"),
        (2, 1, {"dispatch": "padded", "transport": "shm"}, "PaddedDispatcher"),
        (4, 2, {"transport": "shm"}, "HierarchicalDispatcher"),
    ],
)
def test_dispatchers(ranks, hosts, config, name):
    expected = [name, True] if name == "PaddedDispatcher" else [name, True] * 2
    assert pool(ranks).run(made, config, hosts) == [expected] * ranks


def layer_of_one_rank() -> str:
    from tests.mcore.megatron_case import LayerCase, make_layer

    layer = make_layer(LayerCase(ep=1, scalemoe=ScaleMoEConfig(transport="shm")), "scalemoe")
    layer(torch.randn(4, 1, 16))
    return type(layer.token_dispatcher.dispatcher).__name__


def test_one_rank_needs_no_transport():
    assert pool(2).run(layer_of_one_rank) == ["LocalDispatcher"] * 2


def layer_over_two_hosts(placed: bool) -> tuple[str, float]:
    """Class name of a layer's dispatcher on two pretended hosts of two, and the largest difference to stock Megatron's layer."""
    from tests.mcore import megatron_case

    case = megatron_case.LayerCase(ep=4, scalemoe=ScaleMoEConfig(transport="shm"))
    from megatron_scalemoe.mcore.layers import token_dispatcher
    from tests.mcore.test_parity import _difference

    make_layer, made = megatron_case.make_layer, []

    def make_placed(case, kind):
        layer = make_layer(case, kind)
        if placed:
            layer.token_dispatcher.set_placement(LayerPlacement(np.arange(8), 4, np.array([0, 0, 1, 1])))
        made.append(layer.token_dispatcher)
        return layer

    stock = megatron_case.run_layer(case, "alltoall")
    with (
        mock.patch.dict(channels._layouts, clear=True),
        mock.patch.dict(channels._channels, clear=True),
        mock.patch.object(token_dispatcher, "this_host", return_value=f"host {dist.get_rank() // 2}"),
        mock.patch.object(megatron_case, "make_layer", make_placed),
    ):
        ours = megatron_case.run_layer(case, "scalemoe")
    return type(made[0].dispatcher).__name__, max(_difference(ours[name], stock[name]) for name in stock)


@pytest.mark.parametrize(("placed", "expected"), [(False, "HierarchicalDispatcher"), (True, "PlacedDispatcher")])
def test_a_layer_over_two_hosts(placed, expected):
    for name, difference in pool(4).run(layer_over_two_hosts, placed):
        assert name == expected
        assert difference <= 1e-6


def measured_over_transports(spoil: bool) -> tuple[bool, dict[str, int], float]:
    """As `scalemoe bench dispatch` does it: same bits, bytes by collectives, largest error. spoil: one transport sums with an error."""
    from tests.mcore.megatron_case import LayerCase, initialize, transformer_config

    initialize(tp=1, ep=2, expert_tp=1)
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_scalemoe.bench.measure import measure_dispatchers, same_bits
    from megatron_scalemoe.bench.routed_tokens import make_routed_tokens
    from megatron_scalemoe.mcore.stock import make_dispatchers

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
