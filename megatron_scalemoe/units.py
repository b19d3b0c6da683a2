"""Numbers and tables as people read them, and what units are worth in each other."""

# A GB/s is 10^9 bytes a second.
BYTES_PER_US_PER_GBps = 1e3


def format_bytes(count: float) -> str:
    """`67108864` -> `64.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_table(headers: list[str], rows: list[list[object]]) -> str:
    """Columns padded to their widest cell; those whose every cell starts with a digit go to the right. No trailing blanks."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    right = [bool(cells) and all(row[i][:1].isdigit() for row in cells) for i in range(len(headers))]

    def line(values: list[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, cells)])
