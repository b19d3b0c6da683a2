"""Megatron's six-step token dispatcher over one of our dispatchers."""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.dispatch.base import Dispatcher, RowsSent
from megatron_scalemoe.dispatch.fused import FusedDispatcher
from megatron_scalemoe.dispatch.hierarchical import HierarchicalDispatcher
from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher, gather_by_collective
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.dispatch.transport_choice import CallSizes, Channel, channel_of, check_transport
from megatron_scalemoe.ops import library


def make_dispatcher(
    megatron: TransformerConfig,
    scalemoe: ScaleMoEConfig,
    pg_collection: ProcessGroupCollection,
    x_TD: Tensor,
    placement: LayerPlacement | None = None,
) -> Dispatcher:
    """The dispatcher that fits the groups: local on one rank, otherwise the one that `scalemoe` names; under a placement, if given.

    x_TD: what it will dispatch, for the sizes. Collective over the dispatch group at the first call, which opens a transport.
    """
    if pg_collection.tp_ep.size() == 1:
        return LocalDispatcher()
    if scalemoe.dispatch == "padded":
        return PaddedDispatcher(pg_collection.ep, megatron.num_moe_experts, megatron.moe_router_topk, scalemoe.padded_capacity_factor)
    # padding to capacity gives tokens to experts that they did not choose
    padded = megatron.moe_pad_expert_input_to_capacity
    most_experts = megatron.num_moe_experts if padded else megatron.moe_router_topk
    group, expert_tp_size = pg_collection.tp_ep, pg_collection.expt_tp.size()
    varying = megatron.variable_seq_lengths
    sizes = CallSizes(*x_TD.shape, x_TD.dtype, most_experts * expert_tp_size, varying, scalemoe.max_rows_factor)
    channel = channel_of(group, scalemoe.transport, sizes)
    if placement is None:
        # our experts take counts on the device
        return _over(channel, group, megatron.num_moe_experts, most_experts, expert_tp_size, spare_rows=scalemoe.grouped_experts)
    dispatcher = _over(channel, group, placement.slots_P.size, most_experts, expert_tp_size)
    if channel.transport is not None and channel.between is None:
        gather_counts = functools.partial(library.gather_counts, channel.transport)
    else:
        gather_counts = functools.partial(gather_by_collective, group)
    return PlacedDispatcher(dispatcher, placement, group.rank(), expert_tp_size, gather_counts, x_TD.device)


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
    return HierarchicalDispatcher(channel.between, group.size() // num_hosts, inside, num_experts, most_experts, expert_tp_size)


class ScaleMoETokenDispatcher(MoETokenDispatcher):
    """Parks between Megatron's steps what our dispatchers pass along explicitly. By collectives, needs no communication outside the middle
    steps except the exchange of counts, which starts in the first step and is waited for in the second (with replicas, another one in the
    first). The transport is opened in the first step of all.

    dispatcher: None before that. rows_computed: rows that this rank's experts got in training so far. rows_sent: by this rank, likewise.
    selections: (token, expert) pairs that its router should have made for that, tokens x top-k. counting: off while a step is repeated.
    """

    def __init__(self, scalemoe: ScaleMoEConfig, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config, pg_collection=pg_collection)
        self._scalemoe, self._pg_collection = scalemoe, pg_collection
        if scalemoe.dispatch != "padded" and pg_collection.tp_ep.size() > 1:
            check_transport(pg_collection.tp_ep, scalemoe.transport)
        self.dispatcher: Dispatcher | None = None
        self._placement: LayerPlacement | None = None
        self._outdated = True
        self.rows_computed = 0
        self.rows_sent, self.selections = RowsSent(), 0
        self.counting = True
        self._hidden_shape = self._flight = self._metadata = None

    def set_placement(self, placement: LayerPlacement | None) -> None:
        """Dispatch under this placement from now on; None is Megatron's own. Dispatches in flight are not touched."""
        self._placement, self._outdated = placement, True

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._hidden_shape = tokens.shape
        x_TD = tokens.reshape(-1, tokens.shape[-1])
        if self._outdated:
            self.dispatcher = make_dispatcher(self.config, self._scalemoe, self._pg_collection, x_TD, self._placement)
            self._outdated = False
        self._flight = self.dispatcher.prepare(x_TD, probs, routing_map)
        return self._flight.x, self._flight.probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._flight = self.dispatcher.exchange(dataclasses.replace(self._flight, x=hidden_states, probs=probs))
        return self._flight.x, self._flight.probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flight = dataclasses.replace(self._flight, x=hidden_states, probs=probs)
        self._flight = None  # frees the received rows
        rows, tokens_per_expert, row_probs, self._metadata = self.dispatcher.expand(flight)
        if self.counting and torch.is_grad_enabled():  # not in evaluation, and once with recomputation
            self.rows_computed = self.rows_computed + tokens_per_expert.sum()
            self.rows_sent += self.dispatcher.rows_sent(self._metadata)
            self.selections += self._hidden_shape[:-1].numel() * self.config.moe_router_topk
        return rows, tokens_per_expert, row_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return self.dispatcher.reduce(hidden_states, self._metadata)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return self.dispatcher.exchange_back(hidden_states, self._metadata)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        output = self.dispatcher.restore(hidden_states, self._metadata).view(self._hidden_shape)
        self._metadata = None
        return output
