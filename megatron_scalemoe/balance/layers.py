"""The MoE layers of a model under a plan: which row of the plan each one is, and what has to change in it when the plan does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model

from megatron_scalemoe.balance.replicas import LayerReplicas
from megatron_scalemoe.dispatch.placed import LayerPlacement
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.moe_layer import ScaleMoELayer
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan


@dataclasses.dataclass(frozen=True, eq=False)
class LiveLayer:
    """One of this rank's MoE layers. row: its row in plans of the whole model. index: its row in the plan of this pipeline stage."""

    row: int
    index: int
    layer: ScaleMoELayer

    @property
    def experts(self):
        return self.layer.experts

    @property
    def replicas(self) -> LayerReplicas | None:
        """None also with other experts than ours."""
        return getattr(self.experts, "replicas", None)

    @property
    def replica_time_s(self) -> float:
        """How long this rank has waited for replicas."""
        return getattr(self.experts, "replica_time_s", 0.0)

    def apply(self, plan: PlacementPlan, node_of_rank_G: np.ndarray) -> None:
        """Dispatch by this plan of the stage from now on, and make its replicas. The homes must be in place."""
        experts, slots_P = self.experts, plan.physical_to_logical[self.index]
        ranks, homes = plan.num_ranks, experts.num_local_experts
        first = experts.ep_group.rank() * plan.slots_per_rank
        assert experts.home_experts == tuple(slots_P[first : first + homes]), "homes must have moved before"
        has_replicas = (slots_P != EMPTY).sum() > plan.num_logical_experts
        if not has_replicas:
            slots_P = slots_P.reshape(ranks, -1)[:, :homes].reshape(-1)  # no empty slots, no counts to gather
        megatrons_own = not has_replicas and (slots_P == np.arange(plan.num_logical_experts)).all()
        self.layer.token_dispatcher.set_placement(None if megatrons_own else LayerPlacement(slots_P, ranks, node_of_rank_G))
        experts.set_replicas(slots_P if has_replicas else None)


def live_layers(model_chunks: Iterable[torch.nn.Module]) -> tuple[list[LiveLayer], list[int]]:
    """This rank's MoE layers, in the order of the model, and the numbers (from 1) of those of the whole model: the rows of its plans.

    Collective over pipeline ranks. Raises `ScaleMoEError` if no MoE layer of the model is ours.
    """
    layers = [module for chunk in unwrap_model(list(model_chunks)) for module in chunk.modules() if isinstance(module, ScaleMoELayer)]
    group = parallel_state.get_pipeline_model_parallel_group()
    of_stages: list[list[int]] = [[]] * group.size()
    dist.all_gather_object(of_stages, [_number_of(layer) for layer in layers], group=group)
    numbers = sorted(number for stage in of_stages for number in stage)
    if not numbers:
        raise ScaleMoEError("live balance needs a model with ScaleMoE's MoE layers", found="none", try_="use_scalemoe(block_spec, config)")
    assert len(set(numbers)) == len(numbers), numbers
    in_order = sorted(layers, key=_number_of)
    return [LiveLayer(numbers.index(_number_of(layer)), index, layer) for index, layer in enumerate(in_order)], numbers


def _number_of(layer: ScaleMoELayer) -> int:
    """From 1. Layers of multi-token prediction come last; since Megatron 0.19 they count from 1 again, as the layer says."""
    return layer.layer_number + (layer.config.num_layers if getattr(layer, "is_mtp_layer", False) else 0)


def return_gradients_before_reduction(model_chunks: Iterable[torch.nn.Module], layers: Iterable[LiveLayer]) -> None:
    """Makes DDP ask the replicas for their gradients just before it scales and reduces those of the homes, whenever that is.

    Raises `ScaleMoEError` for a model that Megatron's DistributedDataParallel does not wrap.
    """
    left = set(layers)
    for chunk in model_chunks:
        if not isinstance(chunk, DistributedDataParallel):
            raise ScaleMoEError("replicas need Megatron's DistributedDataParallel", found=type(chunk).__name__)
        for bucket_group in chunk.expert_parallel_bucket_groups:
            inside = [live for live in layers if live.experts.fc1 in bucket_group.params or live.experts.fc2 in bucket_group.params]
            bucket_group.start_grad_sync = _after_replicas(bucket_group.start_grad_sync, inside)
            left -= set(inside)
    assert not left, "every expert parameter is in a bucket"


def watch_passes(model_chunk: torch.nn.Module, optimizer, begin: Callable[[], None], stepped: Callable[[], None]) -> None:
    """Calls `begin` when the gradients of a step are set to 0, before its first micro-batch, and `stepped` after each `optimizer.step()`.

    Megatron repeats all micro-batches of a step whose result it doubts, and drops a step without `optimizer.step()`: only these two calls
    tell. A model that DistributedDataParallel does not wrap has no gradient buffer, and is taken never to repeat a step.
    """
    if isinstance(model_chunk, DistributedDataParallel):
        model_chunk.zero_grad_buffer = _followed_by(model_chunk.zero_grad_buffer, begin)
    optimizer.step = _followed_by(optimizer.step, stepped)


def _followed_by(function: Callable, after: Callable[[], None]) -> Callable:
    @functools.wraps(function)
    def both(*args, **options):
        result = function(*args, **options)
        after()
        return result

    return both


def send_replicas_ahead(layers: list[LiveLayer]) -> None:
    """Lets each MoE layer send the next one's replicas when it is done, so that they travel during the attention in between."""
    for live, following in zip(layers, layers[1:], strict=False):
        live.layer.register_forward_hook(lambda *_, following=following: following.replicas and following.replicas.start() and None)


def _after_replicas(start_grad_sync, layers: list[LiveLayer]):
    def start(force_all_reduce: bool = False) -> None:
        for live in layers:
            if live.replicas is not None:
                live.replicas.return_gradients()
        start_grad_sync(force_all_reduce=force_all_reduce)

    return start
