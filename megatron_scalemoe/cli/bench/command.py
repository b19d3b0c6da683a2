"""`scalemoe bench`: measurements, each with its baseline from the same run."""

import argparse
import math
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_scalemoe.cli.bench import kernels as bench_kernels
from megatron_scalemoe.cli.bench import live as bench_live
from megatron_scalemoe.cli.bench import solvers as bench_solvers
from megatron_scalemoe.cli.bench import split as bench_split
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
from megatron_scalemoe.config import TRANSPORTS
from megatron_scalemoe.files import read_document
from megatron_scalemoe.typed import Facts, Number
from megatron_scalemoe.units import format_bytes

WORKER = "megatron_scalemoe.bench.dispatch"
BASELINE = "alltoall"
DISPATCHERS = (BASELINE, "allgather", "padded", "scalemoe")
# Largest accepted `max_rel_error` against the baseline: rounding of sums taken in another order stays far below.
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}


class DispatchSizes(RankSizes):
    """What is dispatched, how often."""

    tokens: int = Field(default=4096, ge=1)
    """tokens per rank"""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """payload type"""

    skew: float = Field(default=1.0, ge=0)
    """Zipf exponent of the experts' load, 0 = uniform"""

    iters: int = Field(default=20, ge=1)
    """measured iterations"""

    warmup: int = Field(default=3, ge=0)
    """iterations before them"""


class _Row(Facts):
    """A dispatcher over a transport, as `bench.dispatch` writes it. max_rel_error: null where it was no number."""

    dispatcher: str
    transport: str
    ranks: int = Field(ge=1)
    dtype: Literal["fp32", "bf16"]
    median_ms: Number = Field(gt=0)
    p90_ms: Number = Field(gt=0)
    bytes_out: Number = Field(ge=0)
    ratio_to_stock: Number = Field(gt=0)
    max_rel_error: Number | None = Field(ge=0)


class _Result(Facts):
    rows: list[_Row] = Field(min_length=1)
    transports_same_bits: bool = True
    env: dict = Field(default_factory=dict)


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `bench dispatch` to the command line."""
    bench = commands.add_parser("bench", help="measure, with the baseline in the same run", allow_abbrev=False, description=__doc__)
    kinds = bench.add_subparsers(title="benchmarks", metavar="WHAT", required=True)
    text = "dispatch + combine, forward and backward, against Megatron's stock alltoall dispatcher"
    parser = kinds.add_parser("dispatch", help=text, description=text, allow_abbrev=False)
    add_option_flags(parser, DispatchSizes)
    parser.add_argument(
        "--dispatchers", nargs="+", choices=DISPATCHERS, default=list(DISPATCHERS), help=f"default all; {BASELINE} is always measured"
    )
    parser.add_argument(
        "--transport",
        nargs="+",
        choices=[name for name in TRANSPORTS if name != "auto"],
        help="what `scalemoe` is measured over, each beside the others and compared bit for bit (default: collective, and shm or cuda if it"
        " can be had)",
    )
    parser.add_argument("--result", type=Path, metavar="FILE", help=f"show what ranks started as `-m {WORKER}` wrote, instead of measuring")
    add_output_flags(parser)
    parser.set_defaults(handler=run_dispatch)
    bench_kernels.add_parser(kinds)
    bench_live.add_parser(kinds)
    bench_solvers.add_parser(kinds)
    bench_split.add_parser(kinds)


def run_dispatch(args: argparse.Namespace) -> int:
    """Launches the ranks and reports. Exit code 3 if a dispatcher's results differ from the baseline's, or the transports' at all."""
    check_output(args.output, force=args.force)
    result = _measure(args) if args.result is None else _read(args.result)
    return emit_measured(args, result, format_result(result), _problems(result))


def _read(path: Path) -> dict:
    """All of the file, when what we use of it is right. Raises `ScaleMoEError` naming file, line and field."""
    document = read_document(path)
    document.parse(_Result)
    return document.data


def _problems(result: dict) -> list[str]:
    tolerance = TOLERANCE[result["rows"][0]["dtype"]]
    wrong = [f"{row['dispatcher']} ({row['transport']})" for row in result["rows"] if not _error_of(row) <= tolerance]
    problems = [f"{', '.join(wrong)} differ from {BASELINE} by more than {tolerance:g}"] if wrong else []
    if not result.get("transports_same_bits", True):
        problems.append("scalemoe's results depend on the transport")
    return problems


def _error_of(row: dict) -> float:
    return math.nan if row["max_rel_error"] is None else row["max_rel_error"]


def _measure(args: argparse.Namespace) -> dict:
    sizes = options_from_args(args, DispatchSizes)
    require_train_extra("scalemoe bench dispatch")
    return result_of_ranks(WORKER, worker_arguments(args, sizes), ranks=sizes.ranks, timeout=sizes.timeout, quiet=args.quiet)


def worker_arguments(args: argparse.Namespace, sizes: DispatchSizes) -> list[str]:
    """The worker's command line: the same flags, the baseline first."""
    dispatchers = list(dict.fromkeys([BASELINE, *args.dispatchers]))
    transports = ["--transport", *dict.fromkeys(args.transport)] if args.transport else []
    return [*flag_words(sizes), "--dispatchers", *dispatchers, *transports]


def format_result(result: dict) -> str:
    """The table that people read."""
    headers = ["dispatcher", "transport", "ranks", "dtype", "median ms", "p90 ms", "bytes out", "ratio to stock", "max rel error"]
    rows = [
        [
            row["dispatcher"],
            row["transport"],
            row["ranks"],
            row["dtype"],
            f"{row['median_ms']:.2f}",
            f"{row['p90_ms']:.2f}",
            format_bytes(row["bytes_out"]),
            f"{row['ratio_to_stock']:.2f}",
            f"{_error_of(row):.1e}",
        ]
        for row in result["rows"]
    ]
    notes = []
    if any(row["transport"] != "collective" for row in result["rows"]):
        notes.append("bytes out are those of collectives: rows that go through shared memory or our CUDA kernels are not counted")
    if "transports_same_bits" in result:
        notes.append(
            f"scalemoe's outputs and gradients over its transports: {'the same bits' if result['transports_same_bits'] else 'DIFFER'}"
        )
    return "\n".join([format_table(headers, rows), *notes])
