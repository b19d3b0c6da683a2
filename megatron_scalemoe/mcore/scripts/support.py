"""Which arguments of Megatron-LM's training scripts ScaleMoE cannot go with, beside those of the model that `support` knows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError


def check_script(args: argparse.Namespace, scalemoe: ScaleMoEConfig) -> None:
    """Raise one `ScaleMoEError` that lists every argument, as Megatron has validated them, that ScaleMoE does not support."""
    problems = [*_problems(args, scalemoe)]
    if scalemoe.sequence_placement != "none":
        problems += _sequence_problems(args, scalemoe)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ScaleMoEError(f"--moe-dispatcher scalemoe does not support this run:\n{lines}", try_="or --moe-dispatcher stock")


def _problems(args: argparse.Namespace, scalemoe: ScaleMoEConfig) -> Iterator[str]:
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
