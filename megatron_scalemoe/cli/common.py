"""What every sub-command shares: output flags and tables."""

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import write_atomically

OK = 0
CHECK_FAILED = 3


def add_output_flags(parser: argparse.ArgumentParser, output_help: str = "also write the result, as JSON, to FILE") -> None:
    """`--json`, `-o/--output`, `--force`, `--quiet`. Results go to stdout, everything else to stderr."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help=output_help)
    group.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    group.add_argument("--quiet", action="store_true", help="no logs on stderr, unless something fails")


def emit(args: argparse.Namespace, result: dict, text: str) -> None:
    """Prints a result as the output flags ask: `text`, or `result` as JSON."""
    # Neither a full disk nor a closed pipe (`| head`) must cost the user a measured result.
    try:
        print_result(args, result, text)
    finally:
        if args.output is not None:
            write_atomically(args.output, json.dumps(result, indent=2) + "\n", force=args.force)


def print_result(args: argparse.Namespace, result: dict, text: str) -> None:
    """For commands whose `--output` is something else than their result."""
    try:
        print(json.dumps(result, indent=2) if args.json else text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python must not try to write the rest again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ScaleMoEError("cannot write the result to stdout", found=error) from error


def progress_bar(args: argparse.Namespace, total: int, unit: str):
    """A bar on stderr, on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, file=sys.stderr, leave=False, disable=True if args.quiet else None)


def format_table(headers: list[str], rows: list[list[object]]) -> str:
    """Columns padded to their widest cell; those whose every cell starts with a digit go to the right. No trailing blanks."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [bool(cells) and all(row[i][:1].isdigit() for row in cells) for i in range(len(headers))]

    def line(values: list[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])
