"""`scalemoe bench kernels`: rows into expert order and back, beside plain torch, Megatron-Core and a copy of as many bytes."""

from __future__ import annotations

import argparse
from typing import Annotated

from pydantic import Field

from megatron_scalemoe.cli.bench.sizes import LayerSizes
from megatron_scalemoe.cli.common import (
    add_option_flags,
    add_output_flags,
    check_output,
    emit_measured,
    format_table,
    options_from_args,
    progress_bar,
)
from megatron_scalemoe.cli.train_extra import require_train_extra
from megatron_scalemoe.typed import Options
from megatron_scalemoe.units import format_bytes

# Largest accepted `max_rel_error` against Megatron, which adds bf16 rows up in bf16.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


class KernelSizes(LayerSizes):
    """What is permuted, how often."""

    threads: int | None = Field(default=None, ge=1)
    """of the CPU; without it as torch chooses"""

    iters: int = Field(default=15, ge=1)
    """measured iterations"""

    warmup: int = Field(default=3, ge=0)
    """iterations before them"""


class KernelCases(Options):
    """MiB of the permuted rows, and Zipf exponents of the experts' load."""

    sizes: list[Annotated[float, Field(gt=0)]]
    skews: list[Annotated[float, Field(ge=0)]]


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench kernels` to the command line."""
    text = "permute and unpermute, forward and backward, against plain torch and Megatron-Core: time, GB/s, fraction of a copy"
    parser = kinds.add_parser("kernels", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "--sizes", nargs="+", type=float, default=[1, 4, 16, 64, 256], metavar="MIB", help="MiB of permuted rows (default 1 4 16 64 256)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE), help="types of the rows (default all)")
    parser.add_argument(
        "--skews", nargs="+", type=float, default=[0, 1.2], metavar="Z", help="Zipf exponents of the experts' load (default 0 1.2)"
    )
    add_option_flags(parser, KernelSizes)
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measures in this process and reports. Exit code 3 if results differ from Megatron's."""
    sizes, cases = options_from_args(args, KernelSizes), options_from_args(args, KernelCases)
    check_output(args.output, force=args.force)
    require_train_extra("scalemoe bench kernels")
    import torch

    from megatron_scalemoe.bench.kernels import CONTENDERS, MEASURED, environment, measure

    if sizes.threads:
        torch.set_num_threads(sizes.threads)
    of_layer = {name: value for name, value in sizes if name != "threads"}
    rows = []
    total = len(cases.sizes) * len(args.dtypes) * len(cases.skews) * len(MEASURED) * len(CONTENDERS)
    with progress_bar(args, total, "row") as bar:
        for row in measure(cases.sizes, args.dtypes, cases.skews, **of_layer):
            rows.append(row)
            bar.update()
    result = {"rows": rows, "env": environment()}
    wrong = sorted({f"{row['by']} ({row['op']}, {row['dtype']})" for row in rows if not row["max_rel_error"] <= TOLERANCE[row["dtype"]]})
    problems = [f"{', '.join(wrong)} differ from megatron"] if wrong else []
    return emit_measured(args, result, format_result(result), problems)


def format_result(result: dict) -> str:
    """The table that people read, and below it what `scalemoe` was."""
    headers = ["op", "dtype", "size", "skew", "by", "median ms", "p90 ms", "GB/s", "of warm copy", "of fresh copy", "max rel error"]
    lines = [format_table(headers, [_cells(row) for row in result["rows"]])]
    env = result["env"]
    if not env["scalemoe_is_native"]:
        reason = f": {env['native']['cpu']}" if env["device"] == "cpu" else ""
        lines.append(f"scalemoe is plain torch here, not native{reason}")
    lines.append("size: of the permuted rows; GB/s: tokens and permuted rows, each read or written once; copy: torch's, of as many bytes")
    return "\n".join(lines)


def _cells(row: dict) -> list[str]:
    names = [row["op"], row["dtype"], format_bytes(row["bytes_permuted"]), f"{row['skew']:g}", row["by"]]
    figures = [f"{row[name]:.2f}" for name in ("median_ms", "p90_ms", "gb_per_s", "of_warm_copy", "of_fresh_copy")]
    return [*names, *figures, f"{row['max_rel_error']:.1e}"]
