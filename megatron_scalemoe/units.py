"""Numbers, tables and results as people and programs read them, and what units are worth in each other."""

import json
import math
import textwrap

# A GB/s is 10^9 bytes a second.
BYTES_PER_US_PER_GBps = 1e3
# What a column of text is shortened to at most before columns are left out.
_LEAST_TEXT = 14


def format_bytes(count: float) -> str:
    """`67108864` -> `64.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def printable(text: str) -> str:
    """Fit for a terminal: what files and names hold may be escape sequences, or no characters at all (lone surrogates)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def to_json(result: object) -> str:
    """JSON that every parser takes: null for infinite and undefined numbers, which JSON has no words for."""
    return json.dumps(_finite(result), indent=2, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_table(headers: list[str], rows: list[list[object]], *, width: int | None = None) -> str:
    """Columns padded to their widest cell; those whose every cell starts with a digit go to the right. No trailing blanks.

    width: the terminal's. Then texts are shortened, the last column is wrapped, and columns that do not fit are left out from the right.
    """
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    right = [bool(cells) and all(row[i][:1].isdigit() for row in cells) for i in range(len(headers))]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    if width is not None:
        widths = _fitted(widths, right, width)
    shown = len(widths)

    def lines(values: list[str]) -> str:
        *fixed, last = values[:shown]
        parts = textwrap.wrap(last, widths[-1]) or [""]
        first = [v if len(v) <= w else f"{v[: w - 1]}…" for v, w in zip(fixed, widths, strict=False)]
        printed = [[*first, parts[0]], *([*[""] * len(first), part] for part in parts[1:])]
        padded = [[v.rjust(w) if r else v.ljust(w) for v, w, r in zip(row, widths, right, strict=False)] for row in printed]
        return "\n".join("  ".join(row).rstrip() for row in padded)

    table = [lines(headers), lines(["-" * w for w in widths]), *map(lines, cells)]
    if shown < len(headers):
        table.append(f"Too narrow for: {', '.join(headers[shown:])}.")
    return "\n".join(table)


def _fitted(widths: list[int], right: list[bool], width: int) -> list[int]:
    """The widths of the columns that are shown, the first two at least."""
    least = [w if r else min(w, _LEAST_TEXT) for w, r in zip(widths, right, strict=True)]
    shown = len(widths)
    while shown > 2 and sum(least[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    widths = widths[:shown]
    over = sum(widths) + 2 * (shown - 1) - width
    for column in sorted(range(shown), key=lambda i: -widths[i]):
        cut = min(max(over, 0), widths[column] - least[column])
        widths[column], over = widths[column] - cut, over - cut
    return widths
