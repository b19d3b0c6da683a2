"""`scalemoe topology`: build, show and check the model of a cluster that all planning commands read."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, add_output_flags, check_output, emit, format_table
from megatron_scalemoe.cli.file_kinds import wanted
from megatron_scalemoe.cli.topology import discover as topology_discover
from megatron_scalemoe.cli.topology.facts import describe, format_description, write_topology
from megatron_scalemoe.errors import ScaleMoEError

if TYPE_CHECKING:
    from megatron_scalemoe.topology.graph import Override

# Named here so that --help needs no import; a test compares them with the builders' own list.
BUILDERS = (
    "dgx_a100",
    "dgx_h100",
    "nvl72",
    "rail_optimized",
    "fat_tree",
    "dragonfly",
    "torus",
    "ring",
    "fully_connected",
    "pcie_box",
    "p4d",
)
OVERRIDE_HELP = (
    "repeatable; VALUE is a factor (0.5) or a bandwidth (25GBps); TARGET is node3 (its links out of the node), "
    "a vertex such as node0/gpu1 (all its links), or one link as 'node0/nic0->fabric'"
)
_SHOWN_FINDINGS = 5


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `topology` and its sub-commands to the command line."""
    topology = commands.add_parser("topology", help="model the cluster", allow_abbrev=False, description=__doc__)
    kinds = topology.add_subparsers(title="what to do", metavar="WHAT", required=True)
    _add_build(kinds)
    for name, handler, text in (
        ("show", run_show, "vertices, links, classes of rank pairs, and what nodes can send"),
        ("check", run_check, "look for what seems wrong; exit code 3 if anything does"),
    ):
        parser = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.add_argument("file", metavar="FILE", type=Path, help="topology YAML")
        add_output_flags(parser)
        parser.set_defaults(handler=handler)
    topology_discover.add_parsers(kinds)


def _add_build(kinds: argparse._SubParsersAction) -> None:
    text = "write the topology of a usual cluster"
    parser = kinds.add_parser("build", help=text, description=f"{text}. `build BUILDER --help` lists its parameters.", allow_abbrev=False)
    parser.add_argument("builder", metavar="BUILDER", choices=BUILDERS, help=", ".join(BUILDERS))
    parser.add_argument("parameters", nargs=argparse.REMAINDER, metavar="...", help="the builder's parameters, then the flags below")
    _add_build_flags(parser)
    parser.set_defaults(handler=run_build)


def _add_build_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--override", metavar="TARGET:VALUE", action="append", default=[], help=OVERRIDE_HELP)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the topology to FILE (YAML) instead of stdout")
    group.add_argument("--force", action="store_true", help="let --output overwrite FILE")
    group.add_argument("--json", action="store_true", help="print a summary as JSON")
    group.add_argument("--quiet", action="store_true", help="print no summary")


def run_build(args: argparse.Namespace) -> int:
    """Builds, then writes the YAML to --output, or to stdout."""
    from megatron_scalemoe.topology.builders import build_topology

    parameters = parse_parameters(args)
    check_output(args.output, force=args.force)
    topology = build_topology(args.builder, parameters).overridden(*map(parse_override, args.override))
    write_topology(args, topology, {})
    return OK


def parse_parameters(args: argparse.Namespace) -> dict:
    """The builder's parameters from the words after its name; the other flags there go into `args`. Exits 2 on wrong usage, as argparse."""
    import inspect

    from megatron_scalemoe.topology.builders import BUILDERS as FUNCTIONS

    function = FUNCTIONS[args.builder]
    parser = argparse.ArgumentParser(
        prog=f"scalemoe topology build {args.builder}", description=function.__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    group = parser.add_argument_group("parameters")
    signature = inspect.signature(function, eval_str=True).parameters
    for name, parameter in signature.items():
        flag, default = f"--{name.replace('_', '-')}", parameter.default
        if isinstance(default, tuple):
            group.add_argument(flag, type=int, nargs="+", metavar="N", help=f"default {' '.join(map(str, default))}")
        else:
            group.add_argument(flag, type=type(default), metavar=type(default).__name__.upper(), help=f"default {default}")
    _add_build_flags(parser)
    parser.parse_args(args.parameters, namespace=args)
    return {name: getattr(args, name) for name in signature if hasattr(args, name)}


def parse_override(text: str) -> Override:
    """`node3:0.5` or `node3:25GBps`. Raises `ScaleMoEError` on anything else; the target is checked against the topology later."""
    from megatron_scalemoe.topology.graph import Override

    target, _, value = text.rpartition(":")
    number = value.removesuffix("GBps")
    try:
        amount = float(number)
    except ValueError:
        amount = math.nan
    if not target or not math.isfinite(amount):
        raise ScaleMoEError("--override must be TARGET:VALUE", found=repr(text), try_="node3:0.5, or node3:25GBps")
    return Override(target, scale=amount) if number == value else Override(target, bandwidth_GBps=amount)


def run_show(args: argparse.Namespace) -> int:
    """Prints what the planner sees in the topology."""
    from megatron_scalemoe.topology.health import node_classes, pair_classes
    from megatron_scalemoe.topology.ports import ports_of
    from megatron_scalemoe.topology.routes import compute_routes
    from megatron_scalemoe.topology.topology_file import load_topology

    check_output(args.output, force=args.force)
    with wanted("topology", args.file, "topology show"):
        topology = load_topology(args.file)
    routes = compute_routes(topology)
    result = {
        **describe(topology),
        "pair_classes": [_without_infinity(row) for row in pair_classes(topology, routes)],
        "node_classes": [_without_infinity(row) for row in node_classes(ports_of(topology, routes))],
    }
    emit(args, result, format_show(result))
    return OK


def _without_infinity(row: tuple) -> dict:
    """A named tuple as JSON takes it: null for infinite (nothing limits) and for unknown."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row._asdict().items()}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def format_show(result: dict) -> str:
    """The description, and the tables of pair classes and of nodes."""
    pairs = [
        [
            "inside nodes" if row["same_node"] else "between nodes",
            row["pairs"],
            _number(row["latency_us"]),
            " - ".join(dict.fromkeys(map(_number, row["bandwidth_GBps"]))),
            "{} -> {}".format(*row["example"]),
        ]
        for row in result["pair_classes"]
    ]
    nodes = [
        [
            str(row["first"]) if row["first"] == row["last"] else f"{row['first']} - {row['last']}",
            row["ranks_per_node"],
            *(_number(row[key]) for key in ("scale_up_GBps", "scale_out_GBps", "node_GBps")),
        ]
        for row in result["node_classes"]
    ]
    overrides = [
        f"override: {o['target']} {'x ' + _number(o['scale']) if o['scale'] is not None else _number(o['bandwidth_GBps']) + ' GB/s'}"
        for o in result["overrides"]
    ]
    return "\n\n".join(
        [
            "\n".join([format_description(result), *overrides]),
            format_table(["rank pairs", "count", "latency_us", "GB/s of one pair alone", "for example"], pairs),
            format_table(["node", "ranks", "scale-up GB/s per rank", "scale-out GB/s per rank", "GB/s of the node"], nodes),
        ]
    )


def run_check(args: argparse.Namespace) -> int:
    """Prints each check with what it found. Exit code 3 if anything looks wrong."""
    from megatron_scalemoe.topology.graph import UnreachableError
    from megatron_scalemoe.topology.health import CHECKS, Finding, find_suspicious
    from megatron_scalemoe.topology.ports import ports_of
    from megatron_scalemoe.topology.routes import compute_routes
    from megatron_scalemoe.topology.topology_file import load_topology

    check_output(args.output, force=args.force)
    try:
        topology = load_topology(args.file)
    except ScaleMoEError as error:
        if not isinstance(error.__cause__, UnreachableError):
            raise
        findings = [Finding("reachable", str(args.file), error.__cause__.problem)]
    else:
        routes = compute_routes(topology)
        findings = find_suspicious(topology, routes, ports_of(topology, routes))
    result = {"ok": not findings, "findings": [finding._asdict() for finding in findings]}
    emit(args, result, format_check(CHECKS, result["findings"]))
    return CHECK_FAILED if findings else OK


def format_check(checks: dict[str, str], findings: list[dict]) -> str:
    """A table of the checks, and the first findings of each that failed."""
    rows, details = [], []
    skipped = any(finding["check"] == "reachable" for finding in findings)
    for name, what in checks.items():
        found = [finding for finding in findings if finding["check"] == name]
        rows.append([f"{len(found)} found" if found else "not run" if skipped else "ok", name, what])
        details += [f"{name}: {finding['where']}: {finding['problem']}" for finding in found[:_SHOWN_FINDINGS]]
        if len(found) > _SHOWN_FINDINGS:
            details.append(f"{name}: and {len(found) - _SHOWN_FINDINGS} more (--json lists all)")
    return "\n\n".join([format_table(["result", "check", "expects that"], rows), *(["\n".join(details)] if details else [])])
