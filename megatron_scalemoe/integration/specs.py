"""Turning any Megatron spec with MoE layers into ours."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.integration.compat import check_megatron_core
from megatron_scalemoe.integration.experts import ScaleMoEGroupedMLP
from megatron_scalemoe.integration.moe_layer import ScaleMoELayer
from megatron_scalemoe.integration.router import ScaleMoERouter


def use_scalemoe(
    block_spec: TransformerBlockSubmodules | ModuleSpec, config: ScaleMoEConfig, pg_collection: ProcessGroupCollection | None = None
) -> TransformerBlockSubmodules | ModuleSpec:
    """A copy of `block_spec` (a block's or a layer's) in which every `MoELayer` is a `ScaleMoELayer`; the original is left alone.

    A custom router is kept (then nothing counts its tokens). Give `pg_collection` when the model is built with process groups other than
    Megatron's global ones. Raises `ScaleMoEError` when megatron-core is not a tested version, and for a layer's spec without MoE; a block
    without is fine, as a pipeline stage may have dense layers only.
    """
    check_megatron_core()
    replaced = copy.deepcopy(block_spec)
    layers = replaced.layer_specs if isinstance(replaced, TransformerBlockSubmodules) else [replaced]
    moe_specs = [spec for layer in layers for spec in (layer, getattr(layer.submodules, "mlp", None)) if is_moe(spec)]
    if not moe_specs and isinstance(replaced, ModuleSpec):
        raise ScaleMoEError(
            "use_scalemoe needs a layer spec whose mlp is megatron's MoELayer",
            found=f"{replaced.module.__name__} without one",
            try_="build the spec with num_experts set",
        )
    for spec in moe_specs:
        _replace(spec, config, pg_collection)
    _quiet_unknown_mlp_warning()
    return replaced


def is_moe(spec: object) -> bool:
    """Whether this is the spec of Megatron's MoE layer, which `use_scalemoe` replaces."""
    return isinstance(spec, ModuleSpec) and spec.module is MoELayer


def _replace(spec: ModuleSpec, config: ScaleMoEConfig, pg_collection: ProcessGroupCollection | None) -> None:
    spec.module = ScaleMoELayer
    spec.params = {**spec.params, "scalemoe": config}
    if pg_collection is not None:
        spec.params["pg_collection"] = pg_collection
    if spec.submodules.router is TopKRouter:
        spec.submodules = dataclasses.replace(spec.submodules, router=functools.partial(ScaleMoERouter, scalemoe=config))
    if config.grouped_experts:
        spec.submodules = dataclasses.replace(spec.submodules, experts=ModuleSpec(module=ScaleMoEGroupedMLP))


def _quiet_unknown_mlp_warning() -> None:
    """TransformerLayer compares the MLP's class with a fixed list and warns about a subclass, needlessly: `ScaleMoELayer` takes the
    default process groups itself."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    if _not_unknown_mlp not in logger.filters:
        logger.addFilter(_not_unknown_mlp)


def _not_unknown_mlp(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")
