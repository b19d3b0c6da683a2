"""Slurm's hostlist expressions: `node[001-003,7],login` -> node001, node002, node003, node7, login."""

from __future__ import annotations

import itertools
import re

from megatron_scalemoe.errors import ScaleMoEError

# Slurm's own limit on the names of one expression (MAX_RANGE).
MAX_NAMES = 65_536
_NAME = re.compile(r"[A-Za-z0-9._-]+")
# Text and [ranges] in turn, up to a comma outside of brackets.
_ITEM = re.compile(r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+")
_BRACKETS = re.compile(r"\[([0-9,-]+)\]")
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def expand_hostlist(text: str) -> tuple[str, ...]:
    """The names in order. Zeros in front are kept, several brackets multiply (`r[1-2]n[1-2]`).

    Raises `ScaleMoEError` on anything else, and on more than 65,536 names.
    """
    names: list[str] = []
    position = 0
    while True:
        match = _ITEM.match(text, position)
        if match is None:
            raise ScaleMoEError("expected a hostlist", found=repr(text[position : position + 80]), try_="node[001-004,7]")
        names += _expand_item(match.group(), MAX_NAMES - len(names))
        position = match.end()
        if position == len(text):
            return tuple(names)
        if text[position] != ",":
            raise ScaleMoEError("expected a comma between names", found=repr(text[position : position + 80]), try_="node[001-004,7]")
        position += 1


def is_name(text: str) -> bool:
    """Whether it is one plain name."""
    return _NAME.fullmatch(text) is not None


def _expand_item(item: str, room: int) -> list[str]:
    pieces = _BRACKETS.split(item)  # text, ranges, text, ranges, ..., text
    choices = [_numbers(piece, room) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > room:
        raise ScaleMoEError(f"a hostlist of more than {MAX_NAMES} names", found=item[:80])
    return ["".join(parts) for parts in itertools.product(*choices)]


def _numbers(ranges: str, room: int) -> list[str]:
    numbers: list[str] = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match.group(1), match.group(2) or match.group(1)) if match else ("1", "0")
        if int(first) > int(last):
            raise ScaleMoEError("expected numbers and ranges in brackets", found=f"[{ranges[:80]}]", try_="[001-004,7]")
        if int(last) - int(first) >= room - len(numbers):
            raise ScaleMoEError(f"a hostlist of more than {MAX_NAMES} names", found=f"[{ranges[:80]}]")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers
