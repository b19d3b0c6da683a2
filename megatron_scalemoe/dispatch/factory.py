"""Makes the dispatcher of a layer: from the configuration, the ranks, the sizes, and a placement if there is one."""

from __future__ import annotations

import functools

import torch.distributed as dist

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.dispatch.base import Dispatcher
from megatron_scalemoe.dispatch.channels import Channel, DispatchSizes, Peers, channel_of
from megatron_scalemoe.dispatch.fused import FusedDispatcher
from megatron_scalemoe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.ops import library


def make_dispatcher(scalemoe: ScaleMoEConfig, peers: Peers, sizes: DispatchSizes, placement: LayerPlacement | None = None) -> Dispatcher:
    """The dispatcher that fits the ranks: local for one, otherwise the one that `scalemoe` names; under a placement, if given.

    Collective over the dispatch group at the first call, which opens a transport.
    """
    group, most, expert_tp_size = peers.group, sizes.max_experts_per_token, sizes.expert_tp_size
    if group.size() == 1:
        return LocalDispatcher()
    if scalemoe.dispatch == "padded":
        return PaddedDispatcher(group, sizes.num_experts, most, scalemoe.padded_capacity_factor)
    channel = channel_of(peers, scalemoe.transport, sizes, scalemoe.max_rows_factor)
    if placement is None:
        # our experts take counts on the device
        return _over(channel, group, sizes.num_experts, most, expert_tp_size, spare_rows=scalemoe.grouped_experts)
    dispatcher = _over(channel, group, placement.slots_P.size, most, expert_tp_size)
    if isinstance(dispatcher, FusedDispatcher):
        gather_counts = functools.partial(library.gather_counts, channel.transport)
    else:
        gather_counts = functools.partial(gather_by_collective, group)
    return PlacedDispatcher(dispatcher, placement, group.rank(), expert_tp_size, gather_counts, peers.device)


def _over(
    channel: Channel, group: dist.ProcessGroup, num_experts: int, most_experts: int, expert_tp_size: int, *, spare_rows: bool = False
) -> Dispatcher:
    """A dispatcher over a channel of `group`."""
    if channel.transport is None:
        return RaggedDispatcher(group, num_experts, most_experts, expert_tp_size)
    if channel.between is None:
        return FusedDispatcher(channel.transport, num_experts, most_experts, expert_tp_size, spare_rows=spare_rows)
    num_hosts = channel.between.size()
    inside = FusedDispatcher(channel.transport, num_experts * expert_tp_size // num_hosts, most_experts * expert_tp_size)
    ranks_per_host = group.size() // num_hosts
    position = group.rank() % ranks_per_host
    return HierarchicalDispatcher(channel.between, ranks_per_host, position, inside, num_experts, most_experts, expert_tp_size)
