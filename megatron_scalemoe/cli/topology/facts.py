"""What a topology is, in one line, as JSON and as its file: shared by the commands that make and show one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import print_result

if TYPE_CHECKING:
    from megatron_scalemoe.topology.graph import Topology


def describe(topology: Topology) -> dict:
    """The facts about a topology that need no routes."""
    kinds = [v.kind for v in topology.vertices]
    return {
        "name": topology.name,
        "builder": topology.builder,
        "parameters": dict(topology.parameters),
        "overrides": [override._asdict() for override in topology.overrides],
        "num_ranks": topology.num_ranks,
        "num_nodes": topology.num_nodes,
        "vertices": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "links": len(topology.links),
        "content_hash": topology.content_hash,
    }


def format_description(facts: dict) -> str:
    """One line."""
    vertices = ", ".join(f"{count} {kind}" for kind, count in facts["vertices"].items())
    ranks, nodes = (f"{facts[f'num_{what}s']} {what}{'s' if facts[f'num_{what}s'] > 1 else ''}" for what in ("rank", "node"))
    return f"{facts['name']}, {ranks} on {nodes} ({vertices}; {facts['links']} links)"


def write_topology(args: argparse.Namespace, topology: Topology, facts: dict) -> None:
    """The YAML to --output or stdout, a summary to stdout; with --json the summary and `facts`."""
    from megatron_scalemoe.topology.topology_file import format_topology, save_topology

    if args.output is not None:
        save_topology(topology, args.output, force=args.force)
    summary = describe(topology)
    if args.json:
        print_result(args, {**summary, **facts}, "")
    elif args.output is None:
        print(format_topology(topology), end="")
    elif not args.quiet:
        print(f"{args.output}: {format_description(summary)}")
