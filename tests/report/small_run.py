"""A run's directory of 2 layers, 4 ranks on 2 nodes and 8 experts, with one file of each kind."""

import json
from pathlib import Path

import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, save_trace

TIMES = {"dispatch_us": 200.0, "combine_us": 210.0, "compute_us": 500.0, "replica_us": 0.0}


def topology() -> Topology:
    return build_topology("rail_optimized", {"nodes": 2, "gpus_per_node": 2})


def trace(hot: int = 6) -> RoutingTrace:
    """Rank 3 (experts 6 and 7) gets most of the tokens under the contiguous placement when expert 6 is hot."""
    counts = np.random.default_rng(0).integers(20, 40, size=(3, 2, 4, 8))
    counts[..., hot] += 200
    return RoutingTrace(counts, meta={"topk": 2, "hidden_size": 64})


def plan(*, replicas: bool = True) -> PlacementPlan:
    """In layer 0 experts 0 and 2 (inside a node), and 3 and 5 (between nodes) have changed places. Expert 6 has a copy on every rank."""
    home = np.array([[1, 0, 0, 2, 2, 1, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3]])
    hosts = home[:, :, None] == np.arange(4)
    if replicas:
        hosts[:, 6] = True
    provenance = {"solver": "memetic", "trace_hash": trace().content_hash, "topology_hash": topology().content_hash}
    return PlacementPlan.from_hosts(home, hosts, replica_slots_per_rank=int(replicas), provenance=provenance)


def summary(policy: str, scale: float, **more: object) -> dict:
    """A row of `compare`, or the result of `simulate`."""
    times = {name: scale * time_us for name, time_us in TIMES.items()}
    balance = {"max_over_mean_mean": 1 + 3 * scale, "max_over_mean_p95": 1 + 4 * scale, "bytes_scale_out": 1e6 * scale}
    return {"policy": policy, "step_us": sum(times.values()), **times, **balance, **more}


def compare() -> dict:
    costs = {"cost_us": 910.0, "lower_bound_us": 400.0, "gap": 0.138, "seconds": 1.5}
    return {"rows": [summary("contiguous", 1.0), summary("greedy", 0.8), summary("memetic", 0.5, **costs)]}


def simulate() -> dict:
    return {**summary("plan.json", 0.6), "baseline": summary("contiguous", 1.0)}


def plan_result() -> dict:
    layers = [
        {"lower_bound_us": 100.0, "history": [[0.0, 300.0], [0.1, 150.0], [0.4, 110.0]]},
        {"lower_bound_us": 200.0, "history": [[0.0, 500.0], [0.3, 220.0]]},
    ]
    return {"solver": "memetic", "cost_us": 330.0, "lower_bound_us": 300.0, "gap": 0.1, "seconds": 0.7, "layers": layers}


def bench_dispatch() -> dict:
    row = {"transport": "gloo", "ranks": 2, "dtype": "fp32", "max_rel_error": 1e-7}
    stock = {"dispatcher": "alltoall", "median_ms": 20.0, "p90_ms": 25.0, "bytes_out": 4_000_000, "ratio_to_stock": 1.0}
    ours = {"dispatcher": "scalemoe", "median_ms": 12.0, "p90_ms": 13.0, "bytes_out": 3_000_000, "ratio_to_stock": 0.6}
    return {"rows": [row | stock, row | ours], "env": {}}


def bench_solvers() -> dict:
    rows = [("contiguous", 0, 1000.0, 0.0), ("contiguous", 1, 1200.0, 0.0), ("memetic", 0, 500.0, 0.4), ("memetic", 1, 600.0, 0.6)]
    return {
        "rows": [{"solver": s, "seed": i, "cost_us": c, "lower_bound_us": 480.0, "gap": c / 480 - 1, "seconds": t} for s, i, c, t in rows]
    }


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def write_run(directory: Path) -> Path:
    """All of the above; returns the directory."""
    directory.mkdir(exist_ok=True)
    save_topology(topology(), directory / "topo.yaml")
    save_trace(trace(), directory / "trace.npz")
    save_plan(plan(), directory / "plan.json")
    results = {"compare": compare, "sim": simulate, "plan_result": plan_result, "bench": bench_dispatch, "solvers": bench_solvers}
    for name, make in results.items():
        write_json(directory / f"{name}.json", make())
    return directory
