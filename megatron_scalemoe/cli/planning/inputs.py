"""Reading a topology, a trace and a plan that belong together, with errors that name the files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.errors import ScaleMoEError

if TYPE_CHECKING:
    from megatron_scalemoe.plan.placement_plan import PlacementPlan
    from megatron_scalemoe.topology.graph import Topology
    from megatron_scalemoe.traffic.trace import RoutingTrace


def add_input_flags(parser: argparse.ArgumentParser) -> None:
    """`--topology` and `--trace`, both needed."""
    parser.add_argument("--topology", type=Path, required=True, metavar="FILE", help="the cluster, from scalemoe topology")
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="the routing, from scalemoe trace")


def load_topology_and_trace(topology_path: Path, trace_path: Path, *, quiet: bool = False) -> tuple[Topology, RoutingTrace]:
    """Both, with the same number of ranks: of a larger topology, the first ranks. Raises `ScaleMoEError` if the topology is smaller."""
    from megatron_scalemoe.topology.topology_file import load_topology
    from megatron_scalemoe.traffic.trace import load_trace

    topology, trace = load_topology(topology_path), load_trace(trace_path)
    if topology.num_ranks < trace.num_ranks:
        problem = f"{topology_path} must have a GPU for each of the {trace.num_ranks} ranks of {trace_path}"
        try_ = f"a topology of {trace.num_ranks} GPUs or more, or a trace of {topology.num_ranks} ranks"
        raise ScaleMoEError(problem, found=f"{topology.num_ranks} GPUs", try_=try_)
    if trace.num_experts % trace.num_ranks:
        problem, found = f"{trace_path}: the number of experts must be a multiple of the ranks", f"{trace.num_experts} on {trace.num_ranks}"
        raise ScaleMoEError(problem, found=found, try_="a trace of ranks that divide the experts")
    if topology.num_ranks > trace.num_ranks and not quiet:
        note = f"{topology_path} has {topology.num_ranks} GPUs, {trace_path} {trace.num_ranks} ranks: the first GPUs are used"
        print(f"scalemoe: note: {note}", file=sys.stderr)
    return topology.subset(trace.num_ranks), trace


def load_plan_for(plan_path: Path, trace: RoutingTrace, trace_path: Path, topology: Topology) -> PlacementPlan:
    """The plan, which must be for the layers, ranks and experts of the trace. Raises `ScaleMoEError` naming both files."""
    from megatron_scalemoe.plan.placement_plan import load_plan
    from megatron_scalemoe.simulate.engine import check_fits

    plan = load_plan(plan_path)
    try:
        check_fits(trace, plan, topology)
    except ScaleMoEError as error:
        raise ScaleMoEError(f"{plan_path}, with {trace_path}: {error}") from error
    return plan
