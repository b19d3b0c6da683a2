"""What all figures of the report share: their look, and the way from a matplotlib figure to SVG inside a page.

Titles are the page's: a `Panel` carries the finding as its title, the picture, what the picture shows for those who cannot see it, and
the numbers. Text and lines take the page's own colour, so that figures follow its light and dark scheme.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_scalemoe.errors import ScaleMoEError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart (jfly.uni-koeln.de/color).
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8a8f98"
BASELINE_COLOR, PLAN_COLOR = ORANGE, BLUE
# Stands for the page's text colour until the SVG is text; no other colour may be this one.
_INK = "#010203"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scalemoe",
    "text.parse_math": False,  # a `$` in a name is a dollar
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), _INK),
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "hatch.color": _INK,
}
_MAX_LABEL = 34
_PX_PER_POINT = 1.35


@dataclasses.dataclass(frozen=True)
class Table:
    """Numbers as text. `wide`: more than a screen of rows, shown on demand."""

    headers: list[str]
    rows: list[list[str]]
    caption: str

    @property
    def wide(self) -> bool:
        return len(self.rows) > 16


@dataclasses.dataclass(frozen=True)
class Panel:
    """One figure of the page. `title`: the finding; `alt`: what the picture shows, in words; `note`: how to read it, or where it ends.

    measured: or else computed from a model.
    """

    title: str
    alt: str
    svg: str
    table: Table
    note: str = ""
    measured: bool = False

    @property
    def heading(self) -> str:
        """The finding, and where it comes from."""
        return f"{'Measured' if self.measured else 'Computed'}: {self.title}"


@contextlib.contextmanager
def drawing(width: float, height: float) -> Iterator[Figure]:
    """A new figure (inches), in the report's style whatever the user's own matplotlib settings are; to be saved before the context ends.

    Raises `ScaleMoEError` when matplotlib is missing.
    """
    with report_style():
        from matplotlib.figure import Figure

        yield Figure(figsize=(width, height), layout="constrained")


@contextlib.contextmanager
def report_style() -> Iterator[None]:
    """The style alone, for figures that others make. Raises `ScaleMoEError` when matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ScaleMoEError("the report's figures need matplotlib", found=error, try_="pip install 'megatron-scalemoe[report]'") from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def to_svg(figure: Figure, name: str) -> str:
    """SVG text for a page, the same for the same figure. `name` keeps its ids apart from those of the page's other figures."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has fonts of its own
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _on_page(tag[0], name), text[text.index("<svg") :])
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert size is not None, "matplotlib writes a viewBox"
    style = f"max-width:{float(size[1]) * _PX_PER_POINT:.0f}px"
    return f'<svg {size[0]} style="{style}" aria-hidden="true" focusable="false">{text.split(">", 1)[1]}'.strip()


def _on_page(tag: str, name: str) -> str:
    """A tag of an SVG file as one of a page with other figures: its own ids, the page's colour. Text between tags stays as it is."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag).replace(_INK, "currentColor")


def label(text: object) -> str:
    """A name from a file as the label of a mark: printable, and short enough for an axis."""
    name = "".join(c if c.isprintable() else "�" for c in str(text))
    return name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL // 2]}…{name[-_MAX_LABEL // 2 + 1 :]}"


def whole_ticks(*axes: object) -> None:
    """Ticks at whole numbers only, for axes (`Axes.xaxis`, ...) that count layers or ranks."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def bar_axes(axes: Axes, names: list[str], xlabel: str, ends: list[float], texts: list[str]) -> None:
    """Axes of horizontal bars, the first at the top: each with its name, a text beside its end, and room for that."""
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel(xlabel)
    longest = max([*ends, 1e-12])
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.text(end + 0.012 * longest, row, text, va="center", fontsize=9)
    axes.set_xlim(0, longest * (1.08 + 0.011 * max(map(len, texts), default=0)))


def time_unit(largest_us: float) -> tuple[float, str]:
    """(us per unit, its name) for an axis of times: seconds from ten on, else ms."""
    return (1e6, "s") if largest_us >= 1e7 else (1e3, "ms")


def format_us(time_us: float) -> str:
    """`1234.5` -> `1.23 ms`."""
    for unit, scale in (("µs", 1.0), ("ms", 1e3)):
        if abs(time_us) < 999.5 * scale:
            return f"{_three_digits(time_us / scale)} {unit}"
    return f"{_three_digits(time_us / 1e6)} s" if abs(time_us) < 999.5e6 else f"{time_us / 1e6:,.0f} s"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 5e-4 else f"{value:.0f}"


def format_gap(gap: float) -> str:
    """`0.0312` -> `3.1%`; rounding below zero is zero."""
    return f"{round(gap, 3) + 0.0:.1%}"


def format_ratio(value: float) -> str:
    """A max/mean or a factor: two digits behind the point while small."""
    return f"{value:.2f}" if value < 9.995 else f"{value:,.1f}" if value < 999.5 else f"{value:,.0f}"
