"""A model with its optimizer, as any Megatron user builds them; `use_scalemoe` is the only line of ours."""

from __future__ import annotations

import argparse
import dataclasses

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from task import Task

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.layers.norm import with_sequence_parallel_norm
from megatron_scalemoe.mcore.specs import use_scalemoe
from megatron_scalemoe.mcore.support import check_supported


@dataclasses.dataclass
class Training:
    """A model ready to train: one DDP-wrapped chunk, its optimizer and learning-rate schedule."""

    model: DistributedDataParallel
    optimizer: object
    scheduler: OptimizerParamScheduler
    config: TransformerConfig


def build_training(args: argparse.Namespace, task: Task, scalemoe: ScaleMoEConfig | None, dispatcher_type: str | None = None) -> Training:
    """Model, optimizer and schedule; stock Megatron where `scalemoe` is None, then with Megatron's `dispatcher_type`."""
    config = transformer_config(args, dispatcher_type or args.moe_token_dispatcher_type)
    if scalemoe is not None:
        check_supported(config, scalemoe)
    model = _wrap(args, config, _model(args, task, config, scalemoe))
    on_cuda = torch.cuda.is_available()
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        min_lr=args.min_lr,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
        overlap_param_gather=args.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(optimizer_config, [model], use_gloo_process_groups=on_cuda)
    config.grad_scale_func = optimizer.scale_loss
    return Training(model, optimizer, _scheduler(args, optimizer), config)


def transformer_config(args: argparse.Namespace, dispatcher_type: str) -> TransformerConfig:
    """Every flag that has the name of a TransformerConfig field, and what differs without CUDA kernels."""
    on_cuda = torch.cuda.is_available()
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    from_flags = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    derived = {
        "num_moe_experts": args.num_experts,
        "moe_token_dispatcher_type": dispatcher_type,
        "gated_linear_unit": args.swiglu,
        "activation_func": torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        "params_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if args.bf16 else torch.float32,
        "sequence_parallel": args.sequence_parallel or (args.tensor_model_parallel_size > 1 and args.num_experts is not None),
        "add_bias_linear": False,
        "bias_dropout_fusion": on_cuda,
        "masked_softmax_fusion": False,  # needs Apex, as the next one
        "gradient_accumulation_fusion": False,
        "finalize_model_grads_func": finalize_model_grads,
    }
    try:
        return TransformerConfig(**{**from_flags, **derived})
    except (ValueError, AssertionError) as error:
        raise ScaleMoEError("Megatron-Core refuses these flags", found=error) from error


def _model(args: argparse.Namespace, task: Task, config: TransformerConfig, scalemoe: ScaleMoEConfig | None) -> torch.nn.Module:
    spec = task.layer_spec(args, config)
    if config.sequence_parallel and args.transformer_impl == "local":
        spec = with_sequence_parallel_norm(spec)
    if scalemoe is not None:
        spec = use_scalemoe(spec, scalemoe)
    return task.model(args, config, spec).to(torch.cuda.current_device())


def _wrap(args: argparse.Namespace, config: TransformerConfig, model: torch.nn.Module) -> DistributedDataParallel:
    if args.bf16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.bf16,
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    model = DistributedDataParallel(config, ddp_config, model)
    if args.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    if args.overlap_param_gather:
        config.param_sync_func = model.start_param_sync
    return model


def _scheduler(args: argparse.Namespace, optimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=max(args.lr_decay_iters or args.train_iters, args.lr_warmup_iters + 1),
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=args.train_iters,
        wd_incr_style="constant",
    )
