"""What every sub-command shares: output flags, tables, and files that are written whole or not at all."""

import argparse
import json
import os
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError

OK = 0
CHECK_FAILED = 3


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """`--json`, `-o/--output`, `--force`, `--quiet`. Results go to stdout, everything else to stderr."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help="also write the result, as JSON, to FILE")
    group.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    group.add_argument("--quiet", action="store_true", help="no logs on stderr, unless something fails")


def emit(args: argparse.Namespace, result: dict, text: str) -> None:
    """Prints a result as the output flags ask: `text`, or `result` as JSON."""
    as_json = json.dumps(result, indent=2)
    # First the screen: a full disk must not cost the user a measured result.
    print(as_json if args.json else text)
    if args.output is not None:
        write_atomically(args.output, as_json + "\n", force=args.force)


def check_output(path: Path | None, *, force: bool) -> None:
    """Raises `ScaleMoEError` if `--output` could not be written: called before a long run, not only after it."""
    if path is None:
        return
    if path.is_dir():
        raise ScaleMoEError("--output must name a file", found=f"the directory {path}")
    if path.exists() and not force:
        raise ScaleMoEError(f"--output: {path} exists", try_="--force to overwrite it, or another name")
    if not path.parent.is_dir():
        raise ScaleMoEError("--output: the directory does not exist", found=path.parent, try_=f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ScaleMoEError("--output: the directory is not writable", found=path.parent)


def write_atomically(path: Path, text: str, *, force: bool) -> None:
    """Writes a file through a temporary one beside it, so that no reader ever sees half of it. Overwrites only with `force`."""
    check_output(path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ScaleMoEError(f"--output: cannot write {path}", found=error) from error
    finally:
        temporary.unlink(missing_ok=True)


def format_table(headers: list[str], rows: list[list[object]]) -> str:
    """Columns padded to their widest cell; those whose every cell starts with a digit go to the right. No trailing blanks."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [bool(cells) and all(row[i][:1].isdigit() for row in cells) for i in range(len(headers))]

    def line(values: list[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])
