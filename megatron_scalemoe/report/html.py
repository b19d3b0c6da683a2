"""The page: one self-contained HTML file, whatever the names in the run's files are."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path

import jinja2

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.report.collect import Run, printable
from megatron_scalemoe.report.figures.common import Table
from megatron_scalemoe.report.page import Story
from megatron_scalemoe.report.sections import tell
from megatron_scalemoe.units import format_bytes
from megatron_scalemoe.version import __version__

_TEMPLATES = Path(__file__).parent / "templates"
_MAX_CELL = 200
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:µs|ms|s|B|KiB|MiB|GiB|TiB|%)(?!\w))")


def make_report(run: Run, cost: CostModel, *, command: str, date: datetime.datetime, progress: Callable[[str], None]) -> tuple[str, Story]:
    """The HTML of a run, and what it says. The same run, command and date give the same text.

    progress: called with the name of each step. Raises `ScaleMoEError` when matplotlib is missing.
    """
    story = tell(run, cost, progress=progress)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["keep_units"] = lambda text: _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)
    page = environment.get_template("report.html").render(
        run=run,
        story=story,
        facts=[("command", command), ("version", f"megatron-scalemoe {__version__}"), ("date", date.isoformat(timespec="seconds"))],
        tables=[_files(run), _constants(cost), *_provenance(run)],
    )
    return printable(page), story


def _files(run: Run) -> Table:
    hashes = {name: item.content_hash for items in (run.topologies, run.traces, run.plans) for name, item in items.items()}
    rows = [[row.name, row.kind, format_bytes(row.bytes), row.sha256[:16], hashes.get(row.name, "–")[:16]] for row in run.files]
    return Table(["file", "kind", "size", "SHA-256", "content hash"], rows, "Files")


def _constants(cost: CostModel) -> Table:
    rows = [[name, str(value)] for name, value in cost]
    return Table(["constant", "value"], rows, "Cost model of the loads that this page computed")


def _provenance(run: Run) -> list[Table]:
    """Who made each plan and trace, as its file says."""
    known = {**{n: p.provenance for n, p in run.plans.items()}, **{n: t.meta for n, t in run.traces.items()}}
    return [
        Table(["key", "value"], [[str(key), _short(str(value))] for key, value in facts.items()], f"Provenance of {name}")
        for name, facts in known.items()
        if facts
    ]


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…"
