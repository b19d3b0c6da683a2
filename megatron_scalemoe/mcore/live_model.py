"""Live balance of a model of Megatron's: its MoE layers, process groups and optimizer, and where training tells what it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.balance.migrate.state import Parameter
from megatron_scalemoe.balance.model import LiveLayer, LiveModel, MoESizes
from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.layers import expert_state
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP
from megatron_scalemoe.mcore.layers.moe_layer import ScaleMoELayer


def live_balance(
    model_chunks: list[torch.nn.Module],
    optimizer: Any,
    config: TransformerConfig,
    scalemoe: ScaleMoEConfig,
    *,
    micro_batches: int,
    micro_batch_size: int | None = None,
    say: Callable[[str], None] = print,
) -> LiveBalance:
    """Live balance of a model that is built, with its optimizer, before the first step. Collective over all ranks.

    micro_batches: of an optimizer step. micro_batch_size: sequences; only sequence placement asks. say: gets the log lines, on the first
    rank of each pipeline stage. Raises `ScaleMoEError` if no MoE layer of the model is ours, or something of it cannot be balanced.
    """
    model = MegatronModel(model_chunks, optimizer, config)
    return LiveBalance(model, scalemoe, micro_batches=micro_batches, micro_batch_size=micro_batch_size, say=say)


def megatron_groups() -> Groups:
    """Megatron's process groups. Raises what Megatron does before its `initialize_model_parallel`."""
    own = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp", "dp", "pp", "ep", "expt_tp", "tp_dp_cp"])
    return Groups(world=dist.group.WORLD, stage=own.tp_dp_cp, pp=own.pp, ep=own.ep, expert_tp=own.expt_tp, tp=own.tp, cp=own.cp, dp=own.dp)


class MegatronModel(LiveModel):
    """The chunks of a model on this rank, as Megatron's pipeline has them. Collective over pipeline ranks to make."""

    def __init__(self, model_chunks: list[torch.nn.Module], optimizer: Any, config: TransformerConfig):
        self._chunks, self._optimizer = model_chunks, optimizer
        self.groups = megatron_groups()
        self.sizes = MoESizes(
            num_experts=config.num_moe_experts,
            topk=config.moe_router_topk,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.moe_ffn_hidden_size,
            gated=config.gated_linear_unit,
            dtype=config.params_dtype,
            pads_to_capacity=config.moe_pad_expert_input_to_capacity,
        )
        self.layers, self.layer_numbers = _live_layers(model_chunks, self.groups.pp)

    def prepare_for_plans(self) -> None:
        """As in `LiveModel`: the model must be in Megatron's DistributedDataParallel, and the optimizer's state be able to move."""
        expert_state.check_migration_support(self._optimizer)
        self._return_gradients_before_reduction()
        if not self._chunks[0].ddp_config.overlap_param_gather:  # there the next layer's parameters may not have come yet
            _send_replicas_ahead(self.layers)

    def watch_passes(self, begin: Callable[[], None], stepped: Callable[[], None]) -> None:
        """As in `LiveModel`. Without DistributedDataParallel there is no gradient buffer, and the model is taken never to repeat a step."""
        if isinstance(self._chunks[0], DistributedDataParallel):
            self._chunks[0].zero_grad_buffer = _followed_by(self._chunks[0].zero_grad_buffer, begin)
        self._optimizer.step = _followed_by(self._optimizer.step, stepped)

    def parameters_of(self, experts: ScaleMoEGroupedMLP) -> tuple[Parameter, ...]:
        return expert_state.find_parameters(experts, self._optimizer)

    def language_model(self) -> tuple[torch.nn.Module, int]:
        if len(self._chunks) > 1:
            problem = "--scalemoe-sequence-placement needs a pipeline that is not interleaved"
            raise ScaleMoEError(problem, found=f"{len(self._chunks)} model chunks")
        model = unwrap_model(self._chunks)[0]
        return model, model.vocab_size

    def _return_gradients_before_reduction(self) -> None:
        """Makes DDP ask the replicas for their gradients just before it scales and reduces those of the homes, whenever that is."""
        left = set(self.layers)
        for chunk in self._chunks:
            if not isinstance(chunk, DistributedDataParallel):
                raise ScaleMoEError("replicas need Megatron's DistributedDataParallel", found=type(chunk).__name__)
            for bucket_group in chunk.expert_parallel_bucket_groups:
                params = bucket_group.params
                inside = [live for live in self.layers if live.experts.fc1 in params or live.experts.fc2 in params]
                bucket_group.start_grad_sync = _after_replicas(bucket_group.start_grad_sync, inside)
                left -= set(inside)
        assert not left, "every expert parameter is in a bucket"


def _live_layers(model_chunks: Iterable[torch.nn.Module], pipeline: dist.ProcessGroup) -> tuple[list[LiveLayer], list[int]]:
    """This rank's MoE layers, in the order of the model, and the numbers (from 1) of those of the whole model: the rows of its plans."""
    layers = [module for chunk in unwrap_model(list(model_chunks)) for module in chunk.modules() if isinstance(module, ScaleMoELayer)]
    of_stages: list[list[int]] = [[]] * pipeline.size()
    dist.all_gather_object(of_stages, [_number_of(layer) for layer in layers], group=pipeline)
    numbers = sorted(number for stage in of_stages for number in stage)
    if not numbers:
        raise ScaleMoEError("live balance needs a model with ScaleMoE's MoE layers", found="none", try_="use_scalemoe(block_spec, config)")
    assert len(set(numbers)) == len(numbers), numbers
    in_order = sorted(layers, key=_number_of)
    return [LiveLayer(numbers.index(_number_of(layer)), index, layer) for index, layer in enumerate(in_order)], numbers


def _number_of(layer: ScaleMoELayer) -> int:
    """From 1. Layers of multi-token prediction come last; since Megatron 0.19 they count from 1 again, as the layer says."""
    return layer.layer_number + (layer.config.num_layers if getattr(layer, "is_mtp_layer", False) else 0)


def _followed_by(function: Callable, after: Callable[[], None]) -> Callable:
    @functools.wraps(function)
    def both(*args, **options):
        result = function(*args, **options)
        after()
        return result

    return both


def _after_replicas(start_grad_sync: Callable, layers: list[LiveLayer]) -> Callable:
    def start(force_all_reduce: bool = False) -> None:
        for live in layers:
            if live.replicas is not None:
                live.replicas.return_gradients()
        start_grad_sync(force_all_reduce=force_all_reduce)

    return start


def _send_replicas_ahead(layers: list[LiveLayer]) -> None:
    """Lets each MoE layer send the next one's replicas when it is done, so that they travel during the attention in between."""
    for live, following in zip(layers, layers[1:], strict=False):
        live.layer.register_forward_hook(lambda *_, following=following: following.replicas and following.replicas.start() and None)
