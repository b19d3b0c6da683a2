"""Reads Slurm's topology.conf: which switches the nodes hang on. (man 5 topology.conf)

    SwitchName=leaf1 Nodes=node[001-004]        topology/tree: leaves with nodes, switches above with switches
    SwitchName=top Switches=leaf[1-2]
    BlockName=b1 Nodes=node[001-018]            topology/block: nodes of low latency to each other

Slurm itself does not use `LinkSpeed` and leaves its unit open. Here it is Gb/s of a node's port on its leaf; between switches it says
nothing, as the number of cables is not given.
"""

from __future__ import annotations

import dataclasses
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders.parts import GBIT_IN_GB
from megatron_scalemoe.topology.discover.hostlist import MAX_NAMES, expand_hostlist, is_name
from megatron_scalemoe.topology.discover.layout import error_at, read_text

_PAIR = re.compile(r"\s*([A-Za-z]+)\s*=\s*(?:\"([^\"]*)\"|(\S+))")
# By the first key of a line, in lower case: the keys that may follow.
_LINES = {
    "switchname": {"switchname", "nodes", "switches", "linkspeed"},
    "blockname": {"blockname", "nodes"},
    "blocksizes": {"blocksizes"},
}
_SPELLING = {"switchname": "SwitchName", "blockname": "BlockName", "blocksizes": "BlockSizes"}
# Joins the blocks: Slurm does not say how they are cabled.
BLOCKS_SWITCH = "blocks"


@dataclasses.dataclass(frozen=True)
class Switch:
    """`hosts` and `switches` hang on it. port_GBps: of each port down, None where the file does not say."""

    name: str
    hosts: tuple[str, ...]
    switches: tuple[str, ...]
    port_GBps: float | None


@dataclasses.dataclass(frozen=True)
class Fabric:
    """switches: each after those that hang on it. hosts: in the file's order. notes: assumptions, to tell the user."""

    path: Path
    switches: tuple[Switch, ...]
    hosts: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Line:
    number: int
    values: dict[str, str]


def read_slurm(path: Path) -> Fabric:
    """Raises `ScaleMoEError` naming file and line, also for switches that hang on themselves."""
    if path.suffix in (".yaml", ".yml"):
        raise ScaleMoEError("topology.yaml is not supported", found=path, try_="topology.conf: the same switches as SwitchName= lines")
    lines = list(_parse_lines(path, read_text(path)))
    kinds = {"block" if "switchname" not in line.values else "switch" for line in lines}
    if not any("switchname" in line.values or "blockname" in line.values for line in lines):
        raise error_at(path, 1, "expected lines with SwitchName= or BlockName=", try_="SwitchName=leaf1 Nodes=node[001-004]")
    if len(kinds) > 1:
        other = next(line for line in lines if "switchname" not in line.values)
        raise error_at(path, other.number, "expected either switches or blocks in one file")
    switches: dict[str, Switch] = {}
    line_of: dict[str, int] = {}
    total = 0
    for line in lines:
        if "blocksizes" in line.values:
            _check_block_sizes(path, line)
            continue
        switch = _switch(path, line)
        total += len(switch.hosts) + len(switch.switches)
        if total > MAX_NAMES:
            raise error_at(path, line.number, f"more than {MAX_NAMES} nodes and switches")
        if switch.name in switches:
            problem = f"{switch.name} was already described in line {line_of[switch.name]}"
            raise error_at(path, line.number, problem)
        switches[switch.name], line_of[switch.name] = switch, line.number
    if kinds == {"block"} and len(switches) > 1:
        if BLOCKS_SWITCH in switches:
            raise error_at(path, line_of[BLOCKS_SWITCH], f"a block cannot be named {BLOCKS_SWITCH!r} here")
        switches[BLOCKS_SWITCH] = Switch(BLOCKS_SWITCH, (), tuple(switches), None)
    ordered = _children_first(path, switches, line_of)
    hosts = tuple(dict.fromkeys(host for switch in switches.values() for host in switch.hosts))
    if clash := next((host for host in hosts if host in switches), None):
        raise error_at(path, line_of[clash], f"{clash} is the name of a node too")
    return Fabric(path, ordered, hosts, tuple(_notes(ordered)))


def _notes(switches: tuple[Switch, ...]) -> Iterator[str]:
    if any(switch.port_GBps for switch in switches):
        yield "LinkSpeed is read as Gb/s of a node's port on its leaf (Slurm leaves the unit open); not used between switches"
    if any(switch.name == BLOCKS_SWITCH for switch in switches):
        yield "Slurm does not say how blocks are cabled: taken one switch per block, and one above (--oversubscription)"


def _parse_lines(path: Path, text: str) -> Iterator[_Line]:
    """Lines with their keys in lower case; a backslash at the end joins the next line to it as it is, `#` starts a comment."""
    pending, first = "", 0
    physical = text.splitlines()
    for number, raw in enumerate(physical, start=1):
        first = first or number
        pending += raw.partition("#")[0].rstrip()
        if pending.endswith("\\") and number < len(physical):
            pending = pending[:-1]
            continue
        if pending.strip():
            yield _parse_line(path, first, pending)
        pending, first = "", 0


def _parse_line(path: Path, number: int, text: str) -> _Line:
    values: dict[str, str] = {}
    position = 0
    while text[position:].strip():
        match = _PAIR.match(text, position)
        if match is None:
            raise error_at(path, number, "expected Key=Value", found=repr(text[position:].strip()[:80]))
        key = match.group(1).lower()
        kind = next(iter(values), key)
        if kind not in _LINES:
            expected = ", ".join(f"{name}=" for name in _SPELLING.values())
            raise error_at(path, number, f"expected one of {expected} first", found=match.group(1)[:80])
        if key not in _LINES[kind]:
            problem = f"unknown key in a line of {_SPELLING[kind]}"
            raise error_at(path, number, problem, found=match.group(1)[:80], try_=f"one of {', '.join(sorted(_LINES[kind]))}")
        if key in values:
            raise error_at(path, number, f"{match.group(1)} stands twice in this line")
        values[key] = match.group(2) if match.group(2) is not None else match.group(3)
        position = match.end()
    return _Line(number, values)


def _switch(path: Path, line: _Line) -> Switch:
    name = line.values.get("switchname", line.values.get("blockname", ""))
    if not is_name(name):
        raise error_at(path, line.number, "a switch's or block's name must be letters, digits, '.', '_' or '-'", found=repr(name[:80]))
    children = {}
    for key in ("nodes", "switches"):
        try:
            children[key] = expand_hostlist(line.values[key]) if key in line.values else ()
        except ScaleMoEError as error:
            raise ScaleMoEError(f"{path}:{line.number}: {key.capitalize()}: {error}") from error
    if not children["nodes"] and not children["switches"]:
        raise error_at(path, line.number, f"{name}: expected Nodes= or Switches=")
    speed = line.values.get("linkspeed")
    if speed is not None and not (re.fullmatch(r"[0-9]{1,7}", speed) and int(speed)):
        raise error_at(path, line.number, "LinkSpeed must be a whole number of Gb/s, 1 or more", found=repr(speed[:80]))
    return Switch(name, children["nodes"], children["switches"], int(speed) * GBIT_IN_GB if speed else None)


def _check_block_sizes(path: Path, line: _Line) -> None:
    """They steer Slurm's reservations and say nothing about cables: read, and left alone."""
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", line.values["blocksizes"]):
        raise error_at(path, line.number, "BlockSizes must be numbers with commas", found=repr(line.values["blocksizes"][:80]))


def _children_first(path: Path, switches: dict[str, Switch], line_of: dict[str, int]) -> tuple[Switch, ...]:
    for switch in switches.values():
        for child in switch.switches:
            if child not in switches:
                raise error_at(path, line_of[switch.name], f"switch {child} of {switch.name} is not described in the file")
    sorter = graphlib.TopologicalSorter(dict.fromkeys(switches, ()))  # first, so that leaves stay in the file's order
    for switch in switches.values():
        sorter.add(switch.name, *switch.switches)
    try:
        order = list(sorter.static_order())
    except graphlib.CycleError as error:
        loop = error.args[1]
        raise error_at(path, line_of[loop[0]], "switches hang on themselves", found=" - ".join(loop[:10])) from error
    return tuple(switches[name] for name in order)
