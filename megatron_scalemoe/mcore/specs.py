"""Turning any Megatron spec with MoE layers into ours."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.compat import check_megatron_core
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP
from megatron_scalemoe.mcore.layers.moe_layer import ScaleMoELayer, ScaleMoERouter


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
    of_layers = [layer.submodules for layer in layers if is_moe(getattr(layer.submodules, "mlp", None))]
    if not of_layers and isinstance(replaced, ModuleSpec):
        raise ScaleMoEError(
            "use_scalemoe needs a layer spec whose mlp is megatron's MoELayer",
            found=f"{replaced.module.__name__} without one",
            try_="build the spec with num_experts set",
        )
    for submodules in of_layers:
        submodules.mlp = _ours(submodules.mlp, config, pg_collection)
    _quiet_unknown_mlp_warning()
    return replaced


def is_moe(spec: object) -> bool:
    """Whether this builds Megatron's MoE layer, which `use_scalemoe` replaces: a `ModuleSpec`, or, since Megatron 0.18, a partial."""
    return getattr(spec, "module", None) is MoELayer or (isinstance(spec, functools.partial) and spec.func is MoELayer)


def _ours(spec: ModuleSpec | functools.partial, config: ScaleMoEConfig, pg_collection: ProcessGroupCollection | None) -> object:
    options = {"scalemoe": config, "default_groups": pg_collection}
    if isinstance(spec, functools.partial):
        submodules = _our_submodules(spec.keywords["submodules"], config)
        return functools.partial(ScaleMoELayer, *spec.args, **{**spec.keywords, "submodules": submodules, **options})
    return dataclasses.replace(
        spec, module=ScaleMoELayer, submodules=_our_submodules(spec.submodules, config), params={**spec.params, **options}
    )


def _our_submodules(submodules: MoESubmodules, config: ScaleMoEConfig) -> MoESubmodules:
    if submodules.router is TopKRouter:
        submodules = dataclasses.replace(submodules, router=functools.partial(ScaleMoERouter, scalemoe=config))
    return dataclasses.replace(submodules, experts=ScaleMoEGroupedMLP) if config.grouped_experts else submodules


def _quiet_unknown_mlp_warning() -> None:
    """TransformerLayer compares the MLP's class with a fixed list and warns about a subclass, needlessly: `ScaleMoELayer` takes the
    default process groups itself."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    if _not_unknown_mlp not in logger.filters:
        logger.addFilter(_not_unknown_mlp)


def _not_unknown_mlp(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Unknown MLP type")
