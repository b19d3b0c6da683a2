"""Megatron's six-step token dispatcher over one of our dispatchers."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.dispatch.base import Dispatcher
from megatron_scalemoe.dispatch.local import LocalDispatcher
from megatron_scalemoe.dispatch.padded import PaddedDispatcher
from megatron_scalemoe.dispatch.placed import LayerPlacement, PlacedDispatcher
from megatron_scalemoe.dispatch.ragged import RaggedDispatcher
from megatron_scalemoe.integration.traffic_counts import TrafficCounts


def make_dispatcher(
    megatron: TransformerConfig, scalemoe: ScaleMoEConfig, pg_collection: ProcessGroupCollection, placement: LayerPlacement | None = None
) -> Dispatcher:
    """The dispatcher that fits the groups: local on one rank, otherwise the one that `scalemoe` names; under a placement, if given."""
    if pg_collection.tp_ep.size() == 1:
        return LocalDispatcher()
    if scalemoe.dispatch == "padded":
        return PaddedDispatcher(pg_collection.ep, megatron.num_moe_experts, megatron.moe_router_topk, scalemoe.padded_capacity_factor)
    # padding to capacity gives tokens to experts that they did not choose
    padded = megatron.moe_pad_expert_input_to_capacity
    most_experts = megatron.num_moe_experts if padded else megatron.moe_router_topk
    if placement is not None:
        device = torch.device(torch.cuda.current_device())
        return PlacedDispatcher(pg_collection.tp_ep, placement, most_experts, pg_collection.expt_tp.size(), device)
    return RaggedDispatcher(pg_collection.tp_ep, megatron.num_moe_experts, most_experts, pg_collection.expt_tp.size())


class ScaleMoETokenDispatcher(MoETokenDispatcher):
    """Parks between Megatron's steps what our dispatchers pass along explicitly. Needs no communication outside the middle steps except
    the exchange of counts, which starts in the first step and is waited for in the second (with replicas, another one in the first).

    rows_computed: rows that this rank's experts got in training so far. rows_reported: the same at the last `metrics.mean_rank_load`.
    traffic: what else training counted.
    """

    def __init__(self, scalemoe: ScaleMoEConfig, config: TransformerConfig, pg_collection: ProcessGroupCollection):
        super().__init__(config=config, pg_collection=pg_collection)
        self._scalemoe, self._pg_collection = scalemoe, pg_collection
        self.dispatcher = make_dispatcher(config, scalemoe, pg_collection)
        self.rows_computed = self.rows_reported = 0
        self.traffic = TrafficCounts()
        self._hidden_shape = self._flight = self._metadata = None

    def set_placement(self, placement: LayerPlacement | None) -> None:
        """Dispatch under this placement from now on; None is Megatron's own. Dispatches in flight are not touched."""
        self.dispatcher = make_dispatcher(self.config, self._scalemoe, self._pg_collection, placement)

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._hidden_shape = tokens.shape
        self._flight = self.dispatcher.prepare(tokens.reshape(-1, tokens.shape[-1]), probs, routing_map)
        return self._flight.x, self._flight.probs

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._flight = self.dispatcher.exchange(dataclasses.replace(self._flight, x=hidden_states, probs=probs))
        return self._flight.x, self._flight.probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flight = dataclasses.replace(self._flight, x=hidden_states, probs=probs)
        self._flight = None  # frees the received rows
        rows, tokens_per_expert, row_probs, self._metadata = self.dispatcher.expand(flight)
        if torch.is_grad_enabled():  # not in evaluation, and once with recomputation
            self.rows_computed += rows.shape[0]
            selections = self._hidden_shape[:-1].numel() * self.config.moe_router_topk
            self.traffic.add(self._metadata, self._pg_collection.tp_ep, selections, rows.shape[0])
        return rows, tokens_per_expert, row_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return self.dispatcher.reduce(hidden_states, self._metadata)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return self.dispatcher.exchange_back(hidden_states, self._metadata)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        output = self.dispatcher.restore(hidden_states, self._metadata).view(self._hidden_shape)
        self._metadata = None
        return output
