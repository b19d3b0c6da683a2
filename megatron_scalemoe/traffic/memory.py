"""How much memory there is, asked before arrays that depend on what a user typed: Linux kills a process that takes too much."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError

_CGROUPS = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What this process could still take: of the machine, and of its cgroup (Slurm, containers)."""
    found = [_available_in_machine()]
    own = re.search(r"^0::(/.*)$", _text(Path("/proc/self/cgroup")), re.MULTILINE)
    for folder in {_CGROUPS, _CGROUPS / (own.group(1).lstrip("/") if own else "")}:
        limit, used = _text(folder / "memory.max").strip(), re.search(r"^anon (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
        if limit.isdecimal() and used:
            found.append(max(int(limit) - int(used.group(1)), 0))
    return min(found)


def check_memory(num_bytes: int, sizes: str, *, try_: str) -> None:
    """Raises `ScaleMoEError` when arrays of `num_bytes` do not fit. sizes: what they are of, in words."""
    available = available_bytes()
    if num_bytes > available:
        raise ScaleMoEError(f"{sizes} must fit in memory", found=f"{num_bytes >> 20} MiB needed, {available >> 20} available", try_=try_)


def _available_in_machine() -> int:
    known = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE)
    return int(known.group(1)) * 1024 if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
