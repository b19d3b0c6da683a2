"""Whether a checkpoint's distributed optimizer state can be read into the experts of this run.

Megatron saves it tensor by tensor (`fully_reshardable`), or as the flat buffers that it lies in (`dp_reshardable`, its default). In these,
stacked experts and experts that have moved lie in another order than Megatron's, and any state of the same length loads. So grouped experts
are saved in the first format only; flat buffers are read into the order that they have, or refused.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.optimizer import FULLY_RESHARDABLE
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP


class ExpertOrder(enum.IntEnum):
    """In which order the experts' parameters lie in the flat buffers."""

    MEGATRON = 0
    STACKED = 1
    MOVED = 2

    @property
    def text(self) -> str:
        return ("Megatron's experts, one after the other", "grouped experts in Megatron's places", "grouped experts that have moved")[self]


_GO_ON = {
    ExpertOrder.MEGATRON: "load it with --moe-dispatcher stock --dist-ckpt-optim-fully-reshardable --ckpt-convert-format torch_dist "
    "--ckpt-convert-save DIR, which writes DIR/torch_dist, and then load that",
    ExpertOrder.STACKED: "go on with --scalemoe-experts grouped, without a plan, save once, and then load that",
    ExpertOrder.MOVED: "--no-load-optim: the weights are right",
}


def expert_order(model_chunks: Iterable[torch.nn.Module]) -> ExpertOrder:
    """Of the whole model as it is now. Collective over all ranks."""
    modules = [module for chunk in unwrap_model(list(model_chunks)) for module in chunk.modules() if isinstance(module, ScaleMoEGroupedMLP)]
    found = ExpertOrder.MEGATRON
    if modules:
        found = ExpertOrder.STACKED if all(module.in_megatrons_places for module in modules) else ExpertOrder.MOVED
    furthest = torch.tensor(int(found), device=torch.cuda.current_device())
    dist.all_reduce(furthest, op=dist.ReduceOp.MAX)
    return ExpertOrder(int(furthest))


def saved_expert_order(args: Any) -> ExpertOrder:
    """Of the run that saved flat buffers, from Megatron-LM's arguments in its checkpoint, if any.

    Only earlier versions of ours saved grouped experts so. A file named by `--scalemoe-config` is not in the arguments: then the worst is
    assumed.
    """
    if getattr(args, "moe_dispatcher", "stock") != "scalemoe":
        return ExpertOrder.MEGATRON
    if any(getattr(args, f"scalemoe_{name}", None) for name in ("plan", "migrate", "config")):
        return ExpertOrder.MOVED
    grouped = args.scalemoe_experts == "grouped" or args.scalemoe_replicas
    return ExpertOrder.STACKED if grouped else ExpertOrder.MEGATRON


def check_optimizer_layout(path: Path, sharding_type: str | None, saved_args: Any, reads: ExpertOrder) -> None:
    """Raises `ScaleMoEError` if the distributed optimizer's state in the checkpoint at `path` would come to the wrong parameters.

    sharding_type: `distrib_optim_sharding_type` of the checkpoint's own metadata; None in those without any, before Megatron-Core 0.13.
    saved_args: Megatron-LM's arguments of the run that saved it; None where it was not Megatron-LM. reads: the order in this run.
    """
    wrote = saved_expert_order(saved_args)
    if sharding_type == FULLY_RESHARDABLE or (wrote == reads != ExpertOrder.MOVED):
        return
    raise ScaleMoEError(
        f"{path}: the optimizer state ({sharding_type or 'of an old format'}) lies in the order of {wrote.text}",
        found=f"this run has {reads.text}",
        try_=_GO_ON[wrote],
    )
