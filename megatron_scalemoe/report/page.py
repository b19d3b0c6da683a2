"""What a page is made of: sections of panels and tables, and the numbers at its top."""

from __future__ import annotations

import dataclasses

from megatron_scalemoe.report.figures.common import Panel, Table


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page. `tables`: numbers without a figure."""

    id: str
    title: str
    lead: str
    panels: list[Panel]
    tables: list[Table] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Tile:
    """One number at the top of the page, and the baseline's."""

    name: str
    value: str
    before: str


@dataclasses.dataclass(frozen=True)
class Story:
    """What the page says: its first sentence, the numbers below it, the sections and the warnings."""

    summary: str
    tiles: list[Tile]
    sections: list[Section]
    warnings: list[str]
