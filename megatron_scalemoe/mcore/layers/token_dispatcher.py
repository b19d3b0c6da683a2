"""Megatron's six-step token dispatcher over one of our dispatchers."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.dispatch.base import Dispatcher, RowsSent
from megatron_scalemoe.dispatch.channels import DispatchSizes, Peers, check_transport
from megatron_scalemoe.dispatch.factory import make_dispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement
from megatron_scalemoe.ops.transports.shm_memory import this_host


def peers_of(group: dist.ProcessGroup) -> Peers:
    """The ranks of a dispatch group, on Megatron's device and with the group's own timeout."""
    device = torch.device(torch.cuda.current_device())
    return Peers(group, device, this_host(), group._get_backend(device).options._timeout)


class ScaleMoETokenDispatcher(MoETokenDispatcher):
    """Parks between Megatron's steps what our dispatchers pass along explicitly. By collectives, needs no communication outside the middle
    steps except the exchange of counts, which starts in the first step and is waited for in the second (with replicas, another one in the
    first). The transport is opened in the first step of all.

    dispatcher: None before that. rows_computed: rows that this rank's experts got in training so far. rows_sent: by this rank, likewise,
    while `counts_sent`, which takes a few kernels. selections: (token, expert) pairs that its router should have made for that, tokens x
    top-k. counting: off while a step is repeated.
    """

    def __init__(self, scalemoe: ScaleMoEConfig, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config, pg_collection=pg_collection)
        self._scalemoe, self._peers, self._expert_tp_size = scalemoe, peers_of(pg_collection.tp_ep), pg_collection.expt_tp.size()
        if scalemoe.dispatch != "padded" and self._peers.group.size() > 1:
            check_transport(self._peers, scalemoe.transport)
        self.dispatcher: Dispatcher | None = None
        self._placement: LayerPlacement | None = None
        self._outdated = True
        self.rows_computed = 0
        self.rows_sent, self.selections = RowsSent(), 0
        self.counting, self.counts_sent = True, False
        self._hidden_shape = self._flight = self._metadata = None

    def set_placement(self, placement: LayerPlacement | None) -> None:
        """Dispatch under this placement from now on; None is Megatron's own. Dispatches in flight are not touched."""
        self._placement, self._outdated = placement, True

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._hidden_shape = tokens.shape
        x_TD = tokens.reshape(-1, tokens.shape[-1])
        if self._outdated:
            self.dispatcher = make_dispatcher(self._scalemoe, self._peers, self._sizes(x_TD), self._placement)
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
            if self.counts_sent:
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

    def _sizes(self, x_TD: Tensor) -> DispatchSizes:
        # padding to capacity gives tokens to experts that they did not choose
        padded, experts = self.config.moe_pad_expert_input_to_capacity, self.config.num_moe_experts
        most = experts if padded else self.config.moe_router_topk
        return DispatchSizes(experts, most, self._expert_tp_size, *x_TD.shape, x_TD.dtype, self.config.variable_seq_lengths)
