"""The table at the end: every dispatcher from the same checkpoint on the same batches."""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from model import Training, build_training
from results import RunLog
from steps import Data, evaluate, train_step
from task import Task

from megatron_scalemoe.bench.measure import Measurement, measure_dispatchers
from megatron_scalemoe.bench.routed_tokens import RoutedTokens
from megatron_scalemoe.cli.common import format_table
from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.checkpoint.checkpoint import load_checkpoint
from megatron_scalemoe.mcore.stock import make_dispatchers
from megatron_scalemoe.units import format_bytes


@dataclasses.dataclass(frozen=True)
class Variant:
    """One line of the table: its label, the name it has in `mcore.stock.make_dispatchers`, and how its model is built."""

    label: str
    dispatcher: str
    scalemoe: ScaleMoEConfig | None
    megatron_dispatcher: str = "alltoall"


def compare_dispatchers(args, data: Data, checkpoint: str, log: RunLog) -> str:
    """Train `--compare-iters` iterations with each dispatcher, write compare.json, return the table as text."""
    variants = _variants(args)
    log.say(f" comparing {', '.join(variant.label for variant in variants)} ...")
    losses: dict[str, list[float]] = {variant.label: [] for variant in variants}
    times_s: dict[str, list[float]] = {variant.label: [] for variant in variants}
    trainings = {variant.label: _from_checkpoint(args, data.task, variant, checkpoint) for variant in variants}
    routed = capture_routing(trainings[variants[0].label], data)
    for iteration in range(1, args.compare_iters + 1):
        for label, training in trainings.items():  # in turns: the machine's speed drifts
            torch.distributed.barrier()
            start = time.perf_counter()
            losses[label].append(train_step(training, data, args.train_iters + iteration)[0])
            times_s[label].append(time.perf_counter() - start)
    config = trainings[variants[0].label].config
    scalemoe = args.scalemoe or ScaleMoEConfig()
    dispatchers = make_dispatchers([variant.dispatcher for variant in variants], config, scalemoe, get_default_pg_collection())
    measured = measure_dispatchers(dispatchers, routed, iters=max(30, args.compare_iters), warmup=3)
    tokens = args.global_batch_size * args.seq_length
    rows = [_row(variant, losses, times_s, tokens, measured[variant.dispatcher], variants[0]) for variant in variants]
    log.write_json("compare.json", {"rows": rows, "iterations": args.compare_iters, "moe_layers_measured": len(routed)})
    return _table(rows)


def _variants(args) -> list[Variant]:
    ours = args.scalemoe or ScaleMoEConfig()
    variants = [
        Variant("stock alltoall", "alltoall", None),
        Variant("stock allgather", "allgather", None, "allgather"),
        Variant("padded", "padded", ours.replaced(dispatch="padded")),
        Variant("scalemoe", "scalemoe", ours.replaced(dispatch="ragged", padded_capacity_factor=None)),
    ]
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    if expert_tp > 1:  # the padded baseline has no expert tensor parallelism, and stock alltoall none over gloo
        unsupported = {"padded"} if torch.cuda.is_available() else {"padded", "alltoall"}
        variants = [variant for variant in variants if variant.dispatcher not in unsupported]
    return variants


def _from_checkpoint(args, task: Task, variant: Variant, checkpoint: str) -> Training:
    training = build_training(args, task, variant.scalemoe, variant.megatron_dispatcher)
    load_checkpoint(checkpoint, [training.model], training.optimizer, training.scheduler)
    return training


def capture_routing(training: Training, data: Data) -> list[RoutedTokens]:
    """What each MoE layer dispatches for one validation micro-batch."""
    layers = [module for module in training.model.modules() if isinstance(module, MoELayer)]
    captured: dict[MoELayer, RoutedTokens] = {}

    def capture(layer: MoELayer, original):
        def dispatch_preprocess(hidden, routing_map, probs):
            captured.setdefault(layer, RoutedTokens(hidden.reshape(-1, hidden.shape[-1]), probs, routing_map))
            return original(hidden, routing_map, probs)

        return dispatch_preprocess

    for layer in layers:
        layer.token_dispatcher.dispatch_preprocess = capture(layer, layer.token_dispatcher.dispatch_preprocess)
    evaluate(training, data, iters=1)
    for layer in layers:
        del layer.token_dispatcher.dispatch_preprocess  # the class's own is back
    return list(captured.values())


def _row(variant: Variant, losses: dict, times_s: dict, tokens: int, measured: Measurement, baseline: Variant) -> dict:
    own, expected = losses[variant.label], losses[baseline.label]
    return {
        "dispatcher": variant.label,
        "lm_loss": own[-1],
        "max_loss_difference": max(abs(a - b) for a, b in zip(own, expected, strict=True)),
        "dispatch_combine_ms": measured.median_ms,
        "bytes_out": measured.bytes_out,
        "max_rel_error": measured.max_rel_error,
        "tokens_per_s": tokens / statistics.median(times_s[variant.label]),
    }


def _table(rows: list[dict]) -> str:
    cells = [
        [
            row["dispatcher"],
            f"{row['lm_loss']:.6f}",
            f"{row['max_loss_difference']:.1e}",
            format_bytes(row["bytes_out"]),
            f"{row['dispatch_combine_ms']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
        ]
        for row in rows
    ]
    headers = ["dispatcher", "lm loss", "max difference", "bytes on the wire", "dispatch+combine ms", "tokens/s"]
    return "\n" + format_table(headers, cells) + "\n"
