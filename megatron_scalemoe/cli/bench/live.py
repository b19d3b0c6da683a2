"""`scalemoe bench live`: training under skewed routing with live balance, beside stock Megatron on the same batches."""

from __future__ import annotations

import argparse
import statistics

from megatron_scalemoe.cli.common import (
    add_output_flags,
    at_least,
    check_multiple,
    check_output,
    check_topk,
    emit_measured,
    format_table,
    not_negative,
    positive,
)
from megatron_scalemoe.cli.torchrun import result_of_ranks
from megatron_scalemoe.cli.train_extra import require_train_extra
from megatron_scalemoe.config import EXPERTS
from megatron_scalemoe.errors import ScaleMoEError

WORKER = "megatron_scalemoe.bench.live"
# Name, default, least value, help.
NUMBERS = (
    ("ranks", 4, 2, "ranks on this machine = expert-parallel size"),
    ("experts", 16, 1, "experts in each layer, a multiple of --ranks"),
    ("topk", 2, 1, "experts per token"),
    ("hidden", 256, 1, "hidden size"),
    ("ffn", 512, 1, "inner size of an expert"),
    ("layers", 2, 1, "layers, all of them MoE"),
    ("seq", 128, 1, "tokens of a sequence"),
    ("micro_batch", 8, 1, "sequences of a rank's micro-batch"),
    ("micro_batches", 2, 1, "micro-batches of a step"),
    ("replicas", 4, 1, "extra slots per layer, in all; a multiple of --ranks"),
    ("steps", 60, 2, "optimizer steps of each variant"),
    ("refresh", 10, 1, "steps between replans, and that each is made from; less than --steps"),
    ("seed", 0, 0, "seed of weights, tokens and skew"),
)
# Largest accepted difference of any step's loss from stock's.
TOLERANCE = 1e-4


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench live` to the command line."""
    text = "training with live balance (replicas, per-step split, replans) against stock Megatron: balance, experts' time, speed, loss"
    parser = kinds.add_parser("live", help=text, description=text, allow_abbrev=False)
    for name, default, least, help_text in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(least), default=default, help=f"{help_text} (default %(default)s)")
    parser.add_argument("--zipf", type=not_negative, default=1.2, help="exponent of the experts' popularity (default %(default)s)")
    parser.add_argument("--experts-module", choices=EXPERTS, default="grouped", help="of scalemoe without replicas (default %(default)s)")
    parser.add_argument("--timeout", type=positive, default=3600, help="seconds after which all ranks are stopped (default %(default)g)")
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Launches the ranks and reports. Exit code 3 if the loss of a variant differs from stock's."""
    check_multiple(args, "experts", of="ranks")
    check_multiple(args, "replicas", of="ranks")
    check_topk(args)
    if args.refresh >= args.steps:
        raise ScaleMoEError("--refresh must be less than --steps", found=f"--refresh {args.refresh} --steps {args.steps}")
    check_output(args.output, force=args.force)
    require_train_extra("scalemoe bench live")
    result = result_of_ranks(WORKER, worker_arguments(args), ranks=args.ranks, timeout=args.timeout, quiet=args.quiet)
    wrong = [row["variant"] for row in result["rows"] if not row["max_loss_error"] <= TOLERANCE]
    problems = [f"the loss of {', '.join(wrong)} differs from stock's by more than {TOLERANCE:g}"] if wrong else []
    return emit_measured(args, result, format_result(result), problems)


def worker_arguments(args: argparse.Namespace) -> list[str]:
    """The worker's command line: the same flags."""
    names = (*(name for name, *_ in NUMBERS), "zipf", "experts_module", "timeout")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]


def format_result(result: dict) -> str:
    """The table that people read, and below it how long the plans took."""
    headers = ["variant", "max/mean", "p95", "max", "experts ms", "(CPU)", "replicas ms", "replanning ms"]
    headers += ["step ms", "tokens/s", "ratio to stock", "max loss error"]
    lines = [format_table(headers, [_cells(row) for row in result["rows"]])]
    waits_s = [plan["waited_s"] for plan in result["plans"]]
    changed = sum(plan.get("changed", False) for plan in result["plans"])
    lines.append(
        f"{len(waits_s)} plans for live, {changed} with a change; each took {statistics.median(waits_s):.2f} s (median), not in its steps"
    )
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    took_turns = "step_ms" in row
    speed = [f"{row['step_ms']:.1f}", f"{row['tokens_per_s']:.0f}", f"{row['ratio_to_stock']:.2f}"] if took_turns else ["", "", ""]
    balance = [f"{row[name]:.3f}" for name in ("max_over_mean", "max_over_mean_p95", "max_over_mean_max")]
    times = [f"{row[name]:.1f}" for name in ("expert_ms", "expert_cpu_ms")] + [f"{row[name]:.2f}" for name in ("replica_ms", "exposed_ms")]
    return [row["variant"], *balance, *times, *speed, f"{row['max_loss_error']:.1e}"]
