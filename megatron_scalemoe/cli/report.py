"""`scalemoe report`: one self-contained HTML page of what lies in a run's directory."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megatron_scalemoe.cli.common import OK, check_output, format_table
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.files import write_atomically
from megatron_scalemoe.units import format_bytes, to_json

DESCRIPTION = """\
Reads topologies (YAML), traces (npz), plans (JSON) and what `plan`, `simulate`, `compare` and `bench` print with --json, all directly in
RUN_DIR, and the training runs in it (folders with the config.json and train.json of examples/gpt_moe; RUN_DIR may be one). Writes one HTML
page with figures, tables and provenance that works offline. Files are recognised by what is in them."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `report` to the command line."""
    parser = commands.add_parser("report", help="one HTML page of a run", allow_abbrev=False, description=DESCRIPTION)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory with the run's files")
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help="the page (RUN_DIR/report.html)")
    group.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    group.add_argument("--json", action="store_true", help="print what the page says as JSON instead of text")
    group.add_argument("--quiet", action="store_true", help="no logs on stderr, unless something fails")
    add_cost_flags(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page; prints its first sentence, where it is, and what was left out."""
    import datetime

    from megatron_scalemoe.report.collect import collect
    from megatron_scalemoe.report.figures.common import report_style
    from megatron_scalemoe.report.html import make_report
    from megatron_scalemoe.report.training_section import TRAINING

    output = args.output or args.run_dir / "report.html"
    if args.run_dir.is_dir():
        check_output(output, force=args.force)
    with report_style():  # matplotlib is missing: say so before the work, not after
        pass

    def progress(what: str) -> None:
        if not args.quiet:
            print(f"scalemoe: report: {what}", file=sys.stderr)

    progress(f"reading {args.run_dir}")
    found = collect(args.run_dir, ignore=output)
    if args.micro_batches is None:  # one number for the page: what its results were made with
        args.micro_batches = next((r.micro_batches for results in found.results.values() for r in results if r.micro_batches), None)
    cost = cost_from_args(args, next((trace.meta for trace in found.traces.values()), None))
    command = shlex.join(["scalemoe", *sys.argv[1:]])
    page, story = make_report(found, cost, command=command, date=datetime.datetime.now(datetime.timezone.utc), progress=progress)
    write_atomically(output, page, force=args.force)
    tables = [panel.table for section in story.sections if section.id == TRAINING for panel in section.panels[:1]]
    result = {
        "report": str(output),
        "bytes": len(page.encode()),
        "summary": story.summary,
        "files": [{"name": row.name, "kind": row.kind} for row in found.files],
        "training": [dict(zip(table.headers, row, strict=True)) for table in tables for row in table.rows],
        "figures": [panel.heading for section in story.sections for panel in section.panels],
        "warnings": story.warnings,
        "damaged": [{"name": name, "error": error} for name, error in found.damaged],
        "unrecognised": found.unrecognised,
    }
    print(to_json(result) if args.json else format_result(result))
    return OK


def format_result(result: dict) -> str:
    """What people read."""
    figures, files = len(result["figures"]), len(result["files"])
    lines = [result["summary"], f"{result['report']}: {figures} figures from {files} files, {format_bytes(result['bytes'])}"]
    if runs := result["training"]:
        lines += ["", format_table(list(runs[0]), [list(run.values()) for run in runs]), ""]
    lines += [f"warning: damaged, left out: {damaged['error']}" for damaged in result["damaged"]]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    if result["unrecognised"]:
        lines.append(f"not recognised, left out: {', '.join(result['unrecognised'])}")
    return "\n".join(lines)
