"""Numbers as people read them, and what units are worth in each other."""

# A GB/s is 10^9 bytes a second.
BYTES_PER_US_PER_GBps = 1e3


def format_bytes(count: float) -> str:
    """`67108864` -> `64.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
