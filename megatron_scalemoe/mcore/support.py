"""What ScaleMoE cannot do yet, of a model and of Megatron-LM's training scripts, refused at start by flag name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError


def check_supported(megatron: TransformerConfig, scalemoe: ScaleMoEConfig) -> None:
    """Raise one `ScaleMoEError` that lists every flag of this run that ScaleMoE does not support, with the way out."""
    _refuse([*_dispatch_problems(megatron, scalemoe), *(_grouped_problems(megatron) if scalemoe.grouped_experts else ())])


def check_script(args: argparse.Namespace, scalemoe: ScaleMoEConfig) -> None:
    """The same for the arguments of a training script, as Megatron has validated them, beside those of the model."""
    _refuse([*_script_problems(args, scalemoe), *(_sequence_problems(args, scalemoe) if scalemoe.sequence_placement != "none" else ())])


def _refuse(problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ScaleMoEError(f"--moe-dispatcher scalemoe does not support this run:\n{lines}", try_="or --moe-dispatcher stock")


def _dispatch_problems(megatron: TransformerConfig, scalemoe: ScaleMoEConfig) -> Iterator[str]:
    experts, ep = megatron.num_moe_experts, megatron.expert_model_parallel_size
    if experts is None:
        yield "--num-experts is not set: there is no MoE layer to speed up"
    elif experts % ep:
        yield f"--num-experts {experts} is not divisible by --expert-model-parallel-size {ep}"
    elif megatron.moe_router_topk > experts:
        yield f"--moe-router-topk {megatron.moe_router_topk} is more than --num-experts {experts}"
    if megatron.moe_token_dispatcher_type != "alltoall":
        yield f"--moe-token-dispatcher-type {megatron.moe_token_dispatcher_type}: set it to alltoall, which --moe-dispatcher then replaces"
    if megatron.moe_shared_expert_overlap:
        yield "--moe-shared-expert-overlap: remove it, shared experts then run before the dispatch"
    if megatron.overlap_moe_expert_parallel_comm:
        yield "--overlap-moe-expert-parallel-comm: remove it"
    if megatron.moe_router_padding_for_quantization or megatron.fp8 or getattr(megatron, "fp4", None):
        yield "--fp8-format, --fp4-format and --moe-router-padding-for-quantization: train in bf16"
    if megatron.cuda_graph_impl != "none":
        yield f"--cuda-graph-impl {megatron.cuda_graph_impl}: the number of rows changes every step, remove it"
    if scalemoe.dispatch == "padded" and (megatron.expert_tensor_parallel_size or 1) > 1:
        yield "--scalemoe-dispatch padded with --expert-tensor-parallel-size above 1: use --scalemoe-dispatch ragged"
    if scalemoe.dispatch == "padded" and megatron.moe_pad_expert_input_to_capacity:
        yield "--scalemoe-dispatch padded with --moe-pad-expert-input-to-capacity pads twice: remove one of them"
    if scalemoe.replicas and scalemoe.replicas % ep:
        yield f"--scalemoe-replicas {scalemoe.replicas} is not a multiple of --expert-model-parallel-size {ep}: all ranks get equally many"
    if scalemoe.replicas and experts is not None and scalemoe.replicas // ep > experts - experts // ep:
        yield f"--scalemoe-replicas {scalemoe.replicas}: a rank holds no expert twice, so that {ep * (experts - experts // ep)} is the most"


def _grouped_problems(megatron: TransformerConfig) -> Iterator[str]:
    with_experts = "--scalemoe-experts grouped with"
    if megatron.add_bias_linear:
        yield f"{with_experts} biases: add --disable-bias-linear"
    if megatron.moe_latent_size:
        yield f"{with_experts} --moe-latent-size: use --scalemoe-experts megatron"
    if megatron.use_te_activation_func or megatron.activation_func_clamp_value is not None or megatron.glu_linear_offset:
        flags = "--use-te-activation-func, --activation-func-clamp-value or --glu-linear-offset"
        yield f"{with_experts} {flags}: use --scalemoe-experts megatron"
    if megatron.recompute_granularity == "selective" and "moe_act" in (megatron.recompute_modules or ()):
        yield f"{with_experts} --recompute-modules moe_act: recompute moe instead"
    if megatron.delay_wgrad_compute:
        yield f"{with_experts} --delay-wgrad-compute: remove it"
    if megatron.use_kitchen:
        yield f"{with_experts} --kitchen-config-file or --kitchen-recipe-number: use --scalemoe-experts megatron"
    gated = megatron.gated_linear_unit and megatron.activation_func in (torch.nn.functional.silu, quick_gelu)
    if megatron.bias_activation_fusion and not gated:  # Megatron's experts would fail in the first forward
        yield f"{with_experts} a fused activation other than SwiGLU and quick GeGLU: add --no-bias-gelu-fusion"
    if megatron.moe_apply_probs_on_input and megatron.moe_router_topk != 1:
        yield f"{with_experts} --moe-apply-probs-on-input and --moe-router-topk {megatron.moe_router_topk}: only top-1 can do that"
    yield from _grouped_mm_problems(megatron, with_experts)


def _grouped_mm_problems(megatron: TransformerConfig, with_experts: str) -> Iterator[str]:
    """What torch's grouped matrix multiplication cannot do."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        yield f"{with_experts} torch {torch.__version__}, which has no torch.nn.functional.grouped_mm: use torch 2.10 or newer"
    row = 16 // megatron.params_dtype.itemsize  # rows must start at multiples of 16 bytes
    tp, ffn = megatron.expert_tensor_parallel_size, megatron.moe_ffn_hidden_size or megatron.ffn_hidden_size
    if megatron.hidden_size % row or ffn // tp % row:
        sizes = f"--hidden-size {megatron.hidden_size} and --moe-ffn-hidden-size {ffn}"
        yield f"{with_experts} {sizes}: each must be a multiple of {row}, the second on every one of {tp} expert-tensor-parallel ranks"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10:
        # https://github.com/pytorch/pytorch/issues/172439
        yield f"{with_experts} a Blackwell GPU, where torch's grouped_mm returns wrong gradients for experts without a row"


def _script_problems(args: argparse.Namespace, scalemoe: ScaleMoEConfig) -> Iterator[str]:
    if args.num_experts is None:
        yield "--num-experts is not set: there is no MoE layer to speed up"
    if getattr(args, "use_legacy_models", False):
        yield "--use-legacy-models: Megatron-Core's models have the MoE layers"
    if args.use_megatron_fsdp or args.use_torch_fsdp2:
        yield "--use-megatron-fsdp and --use-torch-fsdp2: use --use-distributed-optimizer"
    if args.inprocess_restart:
        yield "--inprocess-restart: remove it, and restart the job from its last checkpoint"
    if getattr(args, "perform_rl_step", False):
        yield "--perform-rl-step: only pre-training and fine-tuning"
    if scalemoe.grouped_experts:
        if args.ckpt_format != "torch_dist" and (args.save or args.load):
            yield f"--ckpt-format {args.ckpt_format} does not know where experts are: use torch_dist"
        if args.non_persistent_ckpt_type == "local":
            yield "--non-persistent-ckpt-type local keeps each rank's flat buffers, in an order that changes with the plan: use global"
        if args.moe_use_upcycling:
            yield "--moe-use-upcycling: convert the dense checkpoint with --moe-dispatcher stock first"


def _sequence_problems(args: argparse.Namespace, scalemoe: ScaleMoEConfig) -> Iterator[str]:
    placing = f"--scalemoe-sequence-placement {scalemoe.sequence_placement} with"
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.context_parallel_size)
    if max(sizes) > 1:  # there not every rank loads data, or only when activations arrive
        yield f"{placing} tensor, pipeline or context parallelism {sizes}: Megatron's data loader can place sequences only without them"
    if args.dataloader_type != "single":  # others start an epoch in the middle of a global batch, or are the user's own
        yield f"{placing} --dataloader-type {args.dataloader_type}: use single"
    if args.rampup_batch_size is not None:
        yield f"{placing} --rampup-batch-size: the number of micro-batches must not change"
    if args.full_validation or args.sft or args.hybrid_context_parallel:
        yield f"{placing} --full-validation, --sft or --hybrid-context-parallel: remove them"
    if scalemoe.sequence_placement == "history" and args.num_workers > 0:
        yield f"{placing} --num-workers {args.num_workers}: add --num-workers 0, loading ahead mixes up the steps"
