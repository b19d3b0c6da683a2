"""Megatron's MoE layer with our token dispatcher, and its top-k router that also counts what it routed."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.layers.token_dispatcher import ScaleMoETokenDispatcher
from megatron_scalemoe.mcore.support import check_supported


class ScaleMoELayer(MoELayer):
    """`MoELayer` whose token dispatcher is ours. Same parameters, same checkpoint keys, same outputs to rounding.

    default_groups: process groups for a Megatron whose transformer layer gives an MoE layer none (before 0.18). options: what a newer one
    gives besides.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        scalemoe: ScaleMoEConfig,
        default_groups: ProcessGroupCollection | None = None,
        **options: Any,
    ):
        check_supported(config, scalemoe)
        pg_collection = pg_collection or default_groups or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **options)
        self.token_dispatcher = ScaleMoETokenDispatcher(scalemoe, self.config, pg_collection)

    def count_tokens(self, on: bool) -> None:
        """Whether router and dispatcher count what training passes through them from now on; they do by default."""
        self.token_dispatcher.counting = on
        if isinstance(self.router, ScaleMoERouter):  # else the user's own, which counts nothing
            self.router.counting = on


class ScaleMoERouter(TopKRouter):
    """Routes exactly as `TopKRouter`, unless a benchmark forces a skew.

    `tokens_per_expert` (int64 [E], on the device) counts this rank's training tokens from the start; recomputed forwards and evaluation are
    not counted, nor what is routed while `counting` is off.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None, *, scalemoe: ScaleMoEConfig, **options: Any
    ):
        super().__init__(config=config, pg_collection=pg_collection, **options)
        self.force_skew = scalemoe.force_skew
        self.counting = True
        counts = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=torch.cuda.current_device())
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.force_skew is not None:
            # the tracker's state is saved for recomputation, and differs between expert-parallel ranks
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                logits = zipf_logits(logits, self.force_skew)
        probs, routing_map = super().routing(logits, padding_mask=padding_mask)
        # with activation recomputation the first forward runs without gradients: count only the second
        if self.counting and self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.tokens_per_expert += routing_map.sum(0)
        return probs, routing_map


def zipf_logits(logits_TE: Tensor, exponent: float) -> Tensor:
    """Random logits whose top-k is k draws without replacement from a Zipf law: expert e has weight (e + 1) ** -exponent.

    Gumbel top-k (Kool et al., ICML 2019). The gradient passes straight through to `logits_TE`. Draws from the default generator of the
    logits' device.
    """
    rank_E = torch.arange(1, logits_TE.shape[-1] + 1, device=logits_TE.device, dtype=torch.float32)
    noise = -torch.empty_like(logits_TE, dtype=torch.float32).exponential_().log()
    forced = (noise - exponent * rank_E.log()).to(logits_TE.dtype)
    return logits_TE + (forced - logits_TE).detach()
