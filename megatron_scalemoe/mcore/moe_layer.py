"""Megatron's MoE layer with our token dispatcher."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.router import ScaleMoERouter
from megatron_scalemoe.mcore.support import check_supported
from megatron_scalemoe.mcore.token_dispatcher import ScaleMoETokenDispatcher


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
