"""`scalemoe flags`: a job's YAML file as Megatron's flags, each with where its value comes from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, format_table
from megatron_scalemoe.units import to_json

if TYPE_CHECKING:
    from megatron_scalemoe.job.job_file import Job


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `flags` to the command line."""
    text = "turn a job's YAML file into Megatron's flags"
    description = f"{text}, one a line, quoted for a shell. Contradictions are refused with the line they are in."
    parser = commands.add_parser("flags", help=text, description=description, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the job's file, as in examples/configs")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--explain", action="store_true", help="print every value with where it comes from, and what follows from them")
    how.add_argument("--json", action="store_true", help="print flags, values and origins as JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints the flags."""
    from megatron_scalemoe.job.checks import check_job
    from megatron_scalemoe.job.flags import flag_words, format_flags, why_unchecked
    from megatron_scalemoe.job.job_file import load_job

    job = load_job(args.config)
    numbers = check_job(job)
    if why := why_unchecked(job):
        print(f"scalemoe: note: Megatron's flags are not checked: {why}", file=sys.stderr)
    if args.json:
        result = {"program": job.content.program, "flags": flag_words(job), "values": describe_values(job), "follows": numbers}
        print(to_json(result))
    elif args.explain:
        print(format_explanation(job, numbers))
    else:
        print(format_flags(job))
    return OK


def describe_values(job: Job) -> list[dict]:
    """All options that have a value, in the order of their sections, and extra flags."""
    from megatron_scalemoe.job.job_file import flag_of
    from megatron_scalemoe.job.sections import SECTIONS

    rows = []
    for (section, option), value in sorted(job.values.items(), key=lambda item: SECTIONS.index(item[0][0])):
        origin = {"value": value.value, "origin": value.origin, "from": value.place}
        rows.append({"section": section, "option": option, "flag": flag_of(section, option), **origin})
    if words := job.content.extra_flags:
        origin = {"value": words, "origin": "file", "from": job.places["extra_flags",]}
        rows.append({"section": "extra_flags", "option": None, "flag": None, **origin})
    return rows


def format_explanation(job: Job, numbers: dict[str, int]) -> str:
    """Tables of all values and of the numbers that follow."""
    rows = []
    for row in describe_values(job):
        name = row["flag"] or f"{row['section']}{'.' + row['option'] if row['option'] else ''}"
        shown = " ".join(map(str, row["value"])) if isinstance(row["value"], list) else json.dumps(row["value"]).strip('"')
        source = row["from"] if row["origin"] == "file" else row["origin"] + (f": {row['from']}" if row["from"] else "")
        rows.append([name, shown, source])
    follows = [[name.replace("_", " "), number] for name, number in numbers.items()]
    return "\n\n".join([format_table(["flag", "value", "from"], rows), format_table(["it follows", ""], follows)])
