"""`scalemoe bench kernels`: rows into expert order and back, beside plain torch, Megatron-Core and a copy of as many bytes."""

from __future__ import annotations

import argparse

from megatron_scalemoe.cli.common import (
    add_output_flags,
    at_least,
    check_output,
    check_topk,
    emit_measured,
    format_table,
    not_negative,
    positive,
    progress_bar,
)
from megatron_scalemoe.cli.train_extra import require_train_extra
from megatron_scalemoe.units import format_bytes

# Largest accepted `max_rel_error` against Megatron, which adds bf16 rows up in bf16.
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-2}


def add_parser(kinds: argparse._SubParsersAction) -> None:
    """Adds `bench kernels` to the command line."""
    text = "permute and unpermute, forward and backward, against plain torch and Megatron-Core: time, GB/s, fraction of a copy"
    parser = kinds.add_parser("kernels", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=[1, 4, 16, 64, 256], metavar="MIB", help="MiB of permuted rows (default 1 4 16 64 256)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=tuple(TOLERANCE), default=list(TOLERANCE), help="types of the rows (default all)")
    parser.add_argument(
        "--skews", nargs="+", type=not_negative, default=[0, 1.2], metavar="Z", help="Zipf exponents of the experts' load (default 0 1.2)"
    )
    parser.add_argument("--hidden", type=at_least(1), default=1024, help="hidden size (default %(default)s)")
    parser.add_argument("--experts", type=at_least(1), default=8, help="(default %(default)s)")
    parser.add_argument("--topk", type=at_least(1), default=2, help="experts per token (default %(default)s)")
    parser.add_argument("--threads", type=at_least(1), help="of the CPU (default: as torch chooses)")
    parser.add_argument("--iters", type=at_least(1), default=15, help="measured iterations (default %(default)s)")
    parser.add_argument("--warmup", type=at_least(0), default=3, help="iterations before them (default %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of tokens and routing (default %(default)s)")
    add_output_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measures in this process and reports. Exit code 3 if results differ from Megatron's."""
    check_topk(args)
    check_output(args.output, force=args.force)
    require_train_extra("scalemoe bench kernels")
    import torch

    from megatron_scalemoe.bench.kernels import CONTENDERS, MEASURED, environment, measure

    if args.threads:
        torch.set_num_threads(args.threads)
    names = ("hidden", "experts", "topk", "iters", "warmup", "seed")
    rows = []
    total = len(args.sizes) * len(args.dtypes) * len(args.skews) * len(MEASURED) * len(CONTENDERS)
    with progress_bar(args, total, "row") as bar:
        for row in measure(args.sizes, args.dtypes, args.skews, **{name: getattr(args, name) for name in names}):
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
