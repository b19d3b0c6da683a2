"""What every sub-command shares: flags of options, output flags and tables."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from megatron_scalemoe.environment import describe_environment
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import check_writable, write_atomically
from megatron_scalemoe.typed import Options, plain_kind
from megatron_scalemoe.units import format_table as units_table
from megatron_scalemoe.units import to_json

OK = 0
CHECK_FAILED = 3

OptionsT = TypeVar("OptionsT", bound=Options)


def add_option_flags(group: argparse._ActionsContainer, model: type[OptionsT], **defaults: object) -> None:
    """A flag for each field of `model`: its name, kind, default (or that in `defaults`) and description. Read by `options_from_args`."""
    for name, field in model.model_fields.items():
        kind, default = plain_kind(field.annotation), defaults.get(name, field.default)
        how: dict = {"type": kind, "metavar": "X" if kind is float else "N"}
        if kind is bool:
            how, default = {"action": argparse.BooleanOptionalAction}, flag_of(name if default else f"no_{name}")
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        elif kind is str:
            how = {"metavar": "NAME"}
        text = f"{' '.join(field.description.split())} ({default})"
        group.add_argument(flag_of(name), dest=name, default=defaults.get(name), help=text, **how)


def given_options(args: argparse.Namespace, model: type[OptionsT]) -> dict:
    """The fields of `model` that are given as flags."""
    return {name: value for name in model.model_fields if (value := getattr(args, name)) is not None}


def flag_words(options: Options) -> list[str]:
    """These options as a command line."""
    return [word for name, value in options for word in (flag_of(name), str(value))]


def options_from_args(args: argparse.Namespace, model: type[OptionsT]) -> OptionsT:
    """Raises `ScaleMoEError` that names the flag of a bad value."""
    with naming_flags():
        return model(**given_options(args, model))


def add_output_flags(parser: argparse.ArgumentParser, output_help: str = "also write the result, as JSON, to FILE") -> None:
    """`--json`, `-o/--output`, `--force`, `--quiet`. Results go to stdout, everything else to stderr."""
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help=output_help)
    group.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    group.add_argument("--quiet", action="store_true", help="no logs on stderr, unless something fails")


def check_output(path: Path | None, *, force: bool, flag: str = "--output") -> None:
    """Raises `ScaleMoEError` if the file that `flag` names could not be written: called before a long run, not only after it."""
    if path is None:
        return
    if os.path.isfile(path) and not force:
        raise ScaleMoEError(f"{path} exists", try_="--force to overwrite it, or another name", place=flag)
    try:
        check_writable(path, force=force)
    except ScaleMoEError as error:
        raise error.at(f"{flag}: {path}") from error


def emit(args: argparse.Namespace, result: dict, text: str) -> None:
    """Prints a result as the output flags ask: `text`, or `result` as JSON."""
    # Neither a full disk nor a closed pipe (`| head`) must cost the user a measured result.
    try:
        print_result(args, result, text)
    finally:
        if args.output is not None:
            write_atomically(args.output, to_json(result) + "\n", force=args.force)


def emit_measured(args: argparse.Namespace, result: dict, text: str, problems: Sequence[str] = ()) -> int:
    """`emit` for what was measured, with where and how; the exit code, 3 if a check has found `problems`."""
    result["env"] = {**describe_environment(["scalemoe", *sys.argv[1:]]), **result.get("env", {})}
    emit(args, result, text)
    for problem in problems:
        print(f"check failed: {problem}", file=sys.stderr)
    return CHECK_FAILED if problems else OK


def format_table(headers: list[str], rows: list[list[object]]) -> str:
    """As `units.format_table`: as wide as the terminal, and as it needs to be elsewhere."""
    return units_table(headers, rows, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


def print_result(args: argparse.Namespace, result: dict, text: str) -> None:
    """For commands whose `--output` is something else than their result."""
    try:
        print(to_json(result) if args.json else text, flush=True)
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


@contextlib.contextmanager
def naming_flags(**places: str) -> Iterator[None]:
    """Errors about a field of what is made inside tell the flag that sets it. places: where it is not the flag of the field's name."""
    try:
        yield
    except ScaleMoEError as error:
        if not error.field or error.place:  # what comes from a file is named by its line
            raise
        name = str(error.field[0])
        raise error.at(places.get(name, flag_of(name)), ()) from error


def flag_of(name: str) -> str:
    """`gpu_TFLOPs` -> `--gpu-tflops`."""
    return f"--{name.replace('_', '-').lower()}"
