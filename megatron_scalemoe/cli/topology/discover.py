"""`scalemoe topology discover` and `measure`: a topology from what a cluster's tools print, or from timed messages between ranks."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, format_table, print_result
from megatron_scalemoe.cli.topology.facts import write_topology
from megatron_scalemoe.cli.torchrun import run_ranks
from megatron_scalemoe.environment import describe_environment, installed_version
from megatron_scalemoe.errors import ScaleMoEError

if TYPE_CHECKING:
    from megatron_scalemoe.topology.discover.layout import NodeLayout
    from megatron_scalemoe.topology.measured import Measurement

WORKER = "megatron_scalemoe.bench.link_probe"
# Named here so that --help needs no import; a test compares them with the readers' own list.
GPU_MODELS = ("p100", "v100", "a100", "h100", "b200", "a6000", "2080ti")
_SHOWN_PAIRS = 20
_OUTPUT_HELP = "write the topology to FILE (YAML)"


def add_parsers(kinds: argparse._SubParsersAction) -> None:
    """Adds `discover` and `measure` to the sub-commands of `topology`."""
    _add_discover(kinds)
    _add_measure(kinds)


def _add_discover(kinds: argparse._SubParsersAction) -> None:
    text = "read a node's GPUs from nvidia-smi or NCCL, and the fabric from Slurm"
    parser = kinds.add_parser("discover", help=text, description=text, allow_abbrev=False)
    node = parser.add_mutually_exclusive_group(required=True)
    node.add_argument("--nvidia-smi", metavar="FILE", type=Path, help="output of `nvidia-smi -L; nvidia-smi topo -m` of one node")
    node.add_argument("--nccl-xml", metavar="FILE", type=Path, help="the file that NCCL wrote where NCCL_TOPO_DUMP_FILE says")
    node.add_argument("--node", metavar="FILE", type=Path, help="topology YAML of one node, as of `topology build dgx_h100`")
    parser.add_argument("--gpu-model", choices=GPU_MODELS, help="for --nvidia-smi without -L; a relative counts (h200: h100)")
    parser.add_argument("--nic-Gbps", metavar="N", type=float, help="speed of each NIC, where the file does not tell or is wrong")
    parser.add_argument("--slurm", metavar="FILE", type=Path, help="topology.conf: all of its nodes, each as the one described")
    parser.add_argument("--hosts", metavar="LIST", help="with --slurm: these nodes only, in rank order: $SLURM_JOB_NODELIST")
    text = "with --slurm: a switch's bandwidth down, divided by that up (default %(default)g)"
    parser.add_argument("--oversubscription", metavar="R", type=float, default=1.0, help=text)
    add_output_flags(parser, _OUTPUT_HELP)
    parser.set_defaults(handler=run_discover)


def _add_measure(kinds: argparse._SubParsersAction) -> None:
    text = "time messages between all pairs of ranks and fit time = latency + bytes / bandwidth"
    description = f"{text}. For several nodes: torchrun ... -m {WORKER} --result-file probe.json, then --probe probe.json."
    parser = kinds.add_parser("measure", help=text, description=description, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="BYTES", help="of the messages (default six, 1 KiB to 16 MiB)")
    parser.add_argument("--iters", type=int, default=20, help="messages of each size (default %(default)s)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which all ranks are stopped (default %(default)g)")
    parser.add_argument("--probe", metavar="FILE", type=Path, help="take this result of the probe instead of measuring")
    text = "compare with this topology, and write it with its links corrected; without, each pair gets a link of its own"
    parser.add_argument("--topology", metavar="FILE", type=Path, help=text)
    add_output_flags(parser, _OUTPUT_HELP)
    parser.set_defaults(handler=run_measure)


def run_discover(args: argparse.Namespace) -> int:
    """Writes the topology to --output, or to stdout; what was assumed goes to stderr."""
    from megatron_scalemoe.topology.discover.cluster import cluster_of
    from megatron_scalemoe.topology.discover.hostlist import expand_hostlist
    from megatron_scalemoe.topology.discover.slurm import read_slurm

    if args.slurm is None and (args.hosts is not None or args.oversubscription != 1.0):
        raise ScaleMoEError("--hosts and --oversubscription belong to a fabric", try_="--slurm topology.conf")
    if args.gpu_model and args.nvidia_smi is None:
        raise ScaleMoEError("--gpu-model belongs to --nvidia-smi", try_="leave it out: the other files say what the GPUs are")
    check_output(args.output, force=args.force)
    layout = _read_layout(args)
    if args.slurm is None:
        topology, hosts, notes = layout.topology, (), layout.notes
    else:
        fabric = read_slurm(args.slurm)
        hosts = fabric.hosts if args.hosts is None else expand_hostlist(args.hosts)
        topology = cluster_of(layout, fabric, hosts=hosts, oversubscription=args.oversubscription)
        notes = layout.notes + fabric.notes
    if not args.quiet:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    write_topology(args, topology, {"notes": list(notes), "hosts": list(hosts)})
    return OK


def _read_layout(args: argparse.Namespace) -> NodeLayout:
    import dataclasses

    from megatron_scalemoe.topology.discover.layout import layout_of_topology, vertices_of_kind, without_slow_nics
    from megatron_scalemoe.topology.discover.nccl_xml import read_nccl_xml
    from megatron_scalemoe.topology.discover.nvidia_smi import read_nvidia_smi
    from megatron_scalemoe.topology.topology_file import load_topology

    if args.nvidia_smi is not None:
        layout = read_nvidia_smi(args.nvidia_smi, args.gpu_model)
    elif args.nccl_xml is not None:
        layout = read_nccl_xml(args.nccl_xml)
    else:
        layout = layout_of_topology(load_topology(args.node))
    if args.nic_Gbps is None:
        return without_slow_nics(layout)
    if not (math.isfinite(args.nic_Gbps) and args.nic_Gbps > 0):
        raise ScaleMoEError("--nic-Gbps must be a finite number above 0", found=args.nic_Gbps)
    nics = [v.name for v in vertices_of_kind(layout.topology, "nic")]
    notes = tuple(note for note in layout.notes if "--nic-Gbps" not in note)
    return dataclasses.replace(layout, nic_GBps=dict.fromkeys(nics, args.nic_Gbps / 8), notes=notes)


def run_measure(args: argparse.Namespace) -> int:
    """Measures, or reads an earlier result; prints fits and residuals; writes the topology to --output."""
    from megatron_scalemoe.topology.measured import corrected, measured_topology, modelled_bandwidth_GBps
    from megatron_scalemoe.topology.topology_file import load_topology, save_topology

    validate(args)
    check_output(args.output, force=args.force)
    modelled = None if args.topology is None else load_topology(args.topology)
    measurement = _measure(args)
    result = describe_measurement(measurement)
    if modelled is None:
        topology = measured_topology(measurement)
    else:
        topology = corrected(modelled, measurement)
        before, after = (modelled_bandwidth_GBps(t, measurement) for t in (modelled, topology))
        for row in result["pairs"]:
            pair = row["source"], row["destination"]
            row["modelled_GBps"], row["corrected_GBps"] = float(before[pair]), float(after[pair])
        result["overrides"] = len(topology.overrides) - len(modelled.overrides)
    if args.probe is None:
        result["env"] = describe_environment(["scalemoe", *sys.argv[1:]])
    print_result(args, result, format_measurement(result))
    if args.output is not None:
        save_topology(topology, args.output, force=args.force)
    return OK


def validate(args: argparse.Namespace) -> None:
    """Raises `ScaleMoEError` for numbers that nothing could be measured with."""
    if args.ranks < 2:
        raise ScaleMoEError("--ranks must be 2 or more", found=args.ranks)
    if args.sizes and (len(set(args.sizes)) < 2 or min(args.sizes) < 1):
        raise ScaleMoEError("--sizes must be two or more different numbers of bytes, 1 or more", found=" ".join(map(str, args.sizes)))
    if args.iters < 1:
        raise ScaleMoEError("--iters must be 1 or more", found=args.iters)
    if not (math.isfinite(args.timeout) and args.timeout > 0):
        raise ScaleMoEError("--timeout must be a finite number of seconds above 0", found=args.timeout)


def _measure(args: argparse.Namespace) -> Measurement:
    if args.probe is not None:
        return _read_probe(args.probe)
    missing = [name for name in ("torch", "psutil") if installed_version(name) is None]
    if missing:
        try_ = "pip install 'megatron-scalemoe[train]'"
        raise ScaleMoEError("scalemoe topology measure needs the train extra", found=f"not installed: {', '.join(missing)}", try_=try_)
    with tempfile.TemporaryDirectory(prefix="scalemoe-measure-") as folder:
        result_file = Path(folder) / "probe.json"
        arguments = ["--iters", str(args.iters), "--timeout", str(args.timeout), "--result-file", str(result_file)]
        if args.sizes:
            arguments += ["--sizes", *map(str, sorted(set(args.sizes)))]
        run_ranks(WORKER, arguments, ranks=args.ranks, timeout=args.timeout, quiet=args.quiet)
        return _read_probe(result_file)


def _read_probe(path: Path) -> Measurement:
    import numpy as np

    from megatron_scalemoe.topology.measured import read_measurement

    try:
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            return read_measurement(path)
    except (np.linalg.LinAlgError, FloatingPointError) as error:
        raise ScaleMoEError("the times of a pair cannot be fitted", found=error, try_="measure again", place=str(path)) from error


def describe_measurement(measurement: Measurement) -> dict:
    """As JSON: for each pair the fit, and per size what was measured and the relative residual."""
    rows = [
        {
            "source": pair.source,
            "destination": pair.target,
            "latency_us": pair.fit.alpha_us,
            "bandwidth_GBps": pair.fit.bandwidth_GBps,
            "r2": pair.fit.r2,
            "bytes": list(pair.num_bytes),
            "time_us": list(pair.time_us),
            "residuals": list(pair.fit.residuals),
        }
        for pair in measurement.pairs
    ]
    return {"num_ranks": measurement.num_ranks, "backend": measurement.backend, "pairs": rows}


def format_measurement(result: dict) -> str:
    """A row per pair, the slowest first; residuals are (fitted - measured) / measured, in the order of the sizes."""
    columns = {"bandwidth_GBps": "GB/s", "modelled_GBps": "modelled GB/s", "corrected_GBps": "corrected GB/s", "latency_us": "latency_us"}
    shown = {key: title for key, title in columns.items() if key in result["pairs"][0]}
    pairs = sorted(result["pairs"], key=lambda row: row["bandwidth_GBps"])
    rows = [
        [
            f"{row['source']} -> {row['destination']}",
            *(f"{row[key]:.4g}" for key in shown),
            f"{row['r2']:.3f}",
            " ".join(f"{round(100 * residual):+d}%" for residual in row["residuals"]),
        ]
        for row in pairs[:_SHOWN_PAIRS]
    ]
    table = format_table(["ranks", *shown.values(), "r2", "residuals"], rows)
    sizes = ", ".join(map(str, result["pairs"][0]["bytes"]))
    lines = [f"{result['num_ranks']} ranks, {result['backend']}; messages of {sizes} bytes", "", table]
    if len(pairs) > _SHOWN_PAIRS:
        lines.append(f"and {len(pairs) - _SHOWN_PAIRS} faster pairs (--json lists all)")
    if "overrides" in result:
        lines += ["", f"links corrected: {result['overrides']}"]
    return "\n".join(lines)
