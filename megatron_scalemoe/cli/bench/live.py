"""`scalemoe bench live`: training under skewed routing with live balance, beside stock Megatron on the same batches."""

from __future__ import annotations

import argparse
import statistics
from typing import Literal

from pydantic import Field, model_validator

from megatron_scalemoe.cli.bench.sizes import RankSizes
from megatron_scalemoe.cli.common import (
    add_option_flags,
    add_output_flags,
    check_output,
    emit_measured,
    flag_words,
    format_table,
    options_from_args,
)
from megatron_scalemoe.cli.torchrun import result_of_ranks
from megatron_scalemoe.cli.train_extra import require_train_extra
from megatron_scalemoe.typed import refused

WORKER = "megatron_scalemoe.bench.live"
# Largest accepted difference of any step's loss from stock's.
TOLERANCE = 1e-4


class TrainingSizes(RankSizes):
    """The model, its data and how often it is planned anew."""

    ranks: int = Field(default=4, ge=2)
    """ranks on this machine = expert-parallel size"""

    experts: int = Field(default=16, ge=1)
    """experts in each layer, a multiple of --ranks"""

    hidden: int = Field(default=256, ge=1)
    """hidden size"""

    ffn: int = Field(default=512, ge=1)
    """inner size of an expert"""

    layers: int = Field(default=2, ge=1)
    """layers, all of them MoE"""

    seq: int = Field(default=128, ge=1)
    """tokens of a sequence"""

    micro_batch: int = Field(default=8, ge=1)
    """sequences of a rank's micro-batch"""

    micro_batches: int = Field(default=2, ge=1)
    """micro-batches of a step"""

    replicas: int = Field(default=4, ge=1)
    """extra slots per layer, in all; a multiple of --ranks"""

    steps: int = Field(default=60, ge=2)
    """optimizer steps of each variant"""

    refresh: int = Field(default=10, ge=1)
    """steps between replans, and that each is made from; less than --steps"""

    zipf: float = Field(default=1.2, ge=0)
    """exponent of the experts' popularity"""

    experts_module: Literal["megatron", "grouped"] = "grouped"
    """of scalemoe without replicas"""

    timeout: float = Field(default=3600, gt=0)
    """seconds after which all ranks are stopped"""

    @model_validator(mode="after")
    def _replans(self) -> TrainingSizes:
        if self.replicas % self.ranks:
            raise refused("must be a multiple of --ranks", field=("replicas",), found=f"--replicas {self.replicas} --ranks {self.ranks}")
        if self.refresh >= self.steps:
            raise refused("must be less than --steps", field=("refresh",), found=f"--refresh {self.refresh} --steps {self.steps}")
        return self


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench live` to the command line."""
    text = "training with live balance (replicas, per-step split, replans) against stock Megatron: balance, experts' time, speed, loss"
    parser = kinds.add_parser("live", help=text, description=text, allow_abbrev=False)
    add_option_flags(parser, TrainingSizes)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Launches the ranks and reports. Exit code 3 if the loss of a variant differs from stock's."""
    sizes = options_from_args(args, TrainingSizes)
    check_output(args.output, force=args.force)
    require_train_extra("scalemoe bench live")
    result = result_of_ranks(WORKER, flag_words(sizes), ranks=sizes.ranks, timeout=sizes.timeout, quiet=args.quiet)
    wrong = [row["variant"] for row in result["rows"] if not row["max_loss_error"] <= TOLERANCE]
    problems = [f"the loss of {', '.join(wrong)} differs from stock's by more than {TOLERANCE:g}"] if wrong else []
    return emit_measured(args, result, format_result(result), problems)


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
