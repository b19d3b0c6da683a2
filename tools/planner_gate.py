"""The planner's gate: one fixed suite of plans, priced by the replay on the links, beside the same suite of another version.

    python tools/planner_gate.py -o before.json                        (in the version before)
    python tools/planner_gate.py -o after.json --against before.json

A version whose searches end by time gets `--time-budget 8` (two layers in 8 s: as four on two cores). Exit code 3 if a plan is more than
1 % dearer, or takes longer to find than the margin allows. Each plan is made in one process, whose CPU time is its clock: a busy machine
neither changes a figure nor cuts a search short. Cases that the output file has already are not run again.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(name, "1")

CHECK_FAILED = 3
SEEDS = (0, 1, 2)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "topologies"
# Balance is worth more than bytes here, as in tools/compare_eplb.py, whose cases the first eight are.
HEAVY = {"hidden_size": 4096, "gpu_TFLOPs": 10.0, "micro_batches": 64}
USUAL = {"micro_batches": 8}
# ScaleMoE's model (PACT'25), as in examples/scalemoe_paper.
PAPER = {"hidden_size": 768, "ffn_hidden_size": 3072, "gated": False, "bytes_per_value": 4, "micro_batches": 8}


def rails(nodes: int, ranks: int) -> dict:
    return {"builder": "rail_optimized", "parameters": {"nodes": nodes, "gpus_per_node": ranks // nodes}}


def case(topology: dict | str, cost: dict, replicas: int, **traffic) -> dict:
    return {"topology": topology, "cost": cost, "replicas": replicas, "traffic": {"layers": 2, "steps": 4, **traffic}}


def suite() -> dict[str, dict]:
    """Name -> case."""
    cases = {}
    for seed in SEEDS:
        eplb = {"tokens_per_rank": 4096, "seed": seed}
        small, large = {"ranks": 16, "experts": 64, "topk": 2, **eplb}, {"ranks": 64, "experts": 256, "topk": 8, **eplb}
        recorded = {"kind": "recorded", "ranks": 16, "experts": 32, "topk": 2, **eplb}
        cases |= {
            f"eplb zipf 64 #{seed}": case(rails(4, 16), HEAVY, 16, kind="zipf", skew=0.8, **small),
            f"eplb zipf 256 #{seed}": case(rails(8, 64), HEAVY, 64, kind="zipf", skew=0.6, **large),
            f"eplb recorded 1.5x #{seed}": case(rails(2, 16), HEAVY, 16, **recorded),
            f"eplb recorded 2x #{seed}": case(rails(2, 16), HEAVY, 32, **recorded),
            f"eplb zipf 64, no replicas #{seed}": case(rails(4, 16), HEAVY, 0, kind="zipf", skew=0.4, **small),
            f"eplb clustered 64 #{seed}": case(rails(4, 16), HEAVY, 16, kind="clustered", skew=0.6, **small),
            f"eplb clustered 64, no replicas #{seed}": case(rails(4, 16), HEAVY, 0, kind="clustered", skew=0.4, **small),
            f"eplb clustered 256 #{seed}": case(rails(8, 64), HEAVY, 64, kind="clustered", skew=0.6, **large),
        }
    networks = {"dgx_h100_8_nodes": 64, "fat_tree_oversubscribed": 64, "torus_4x4x4": 64, "fsmoe_a6000": 48, "fsmoe_2080ti": 32}
    networks |= {"p4d_homogeneous": 32, "p4d_heterogeneous": 32, "two_workstations": 4}
    for name, ranks in networks.items():
        for replicas in (0, ranks):
            sizes = {"ranks": ranks, "experts": 2 * ranks, "topk": 2, "tokens_per_rank": 2048}
            cases[f"{name}, {replicas} replicas"] = case(name, USUAL, replicas, kind="clustered", **sizes)
    for network in ("p4d_homogeneous", "p4d_heterogeneous"):
        sizes = {"ranks": 32, "experts": 64, "topk": 2, "tokens_per_rank": 2048, "skew": 0.8}
        cases[f"paper, {network}"] = case(network, PAPER, 0, kind="zipf", coactivation=False, **sizes)
        cases[f"paper, {network}, clusters"] = case(network, PAPER, 32, kind="clustered", groups=32, source_affinity=0.5, **sizes)
    for replicas in (0, 16):
        recorded = {"kind": "recorded", "ranks": 16, "experts": 32, "topk": 2, "layers": 4, "steps": 16}
        cases[f"recorded, {replicas} replicas"] = case(rails(2, 16), USUAL, replicas, **recorded)
    return cases


def measure(spec: dict, solver: str | None, time_budget_s: float) -> dict:
    """One case: the replayed cost of a step, CPU seconds of the search, and the plan's hash."""
    from megatron_scalemoe.cost.model import CostModel
    from megatron_scalemoe.cost.network import Links
    from megatron_scalemoe.placement.solve import solve_trace
    from megatron_scalemoe.simulate.engine import replay
    from megatron_scalemoe.traffic.synthetic import synthesize

    topology = topology_of(spec["topology"])
    trace = synthesize(**spec["traffic"])
    links, cost = Links(topology), CostModel(**spec["cost"])
    ports = links.ports
    options = {"processes": 1, "links": links} | ({"solver": solver} if solver else {})
    began = time.process_time()
    plan = solve_trace(trace, ports, cost, replicas=spec["replicas"], time_budget_s=time_budget_s, **options).plan
    seconds = time.process_time() - began
    cost_us = replay(trace, plan, links, cost).summary()["step_us"]
    return {"cost_us": cost_us, "time_s": seconds, "plan": plan.content_hash}


def topology_of(spec: dict | str):
    """From a builder and its parameters, or the name of an example."""
    from megatron_scalemoe.topology.builders import build_topology

    if isinstance(spec, dict):
        return build_topology(spec["builder"], spec["parameters"])
    try:
        from megatron_scalemoe.topology.topology_file import load_topology
    except ImportError:  # the versions before 0.14
        from megatron_scalemoe.topology.files import load_topology
    return load_topology(EXAMPLES / f"{spec}.yaml")


def verdict(new: dict[str, dict], old: dict[str, dict], args: argparse.Namespace) -> list[str]:
    """What is dearer, or slower to find; and a line of the whole on standard output."""
    missed, shared = [], [name for name in new if name in old]
    for name in shared:
        ratio = new[name]["cost_us"] / old[name]["cost_us"] - 1
        if ratio > args.dearer:
            missed.append(f"{name}: {ratio:+.2%} dearer")
        longest_s = old[name]["time_s"] * (1 + args.slower) + args.slower_s
        if new[name]["time_s"] > longest_s:
            missed.append(f"{name}: {new[name]['time_s']:.2f} s to find, {old[name]['time_s']:.2f} s before")
    if shared:
        ratios = sorted(new[name]["cost_us"] / old[name]["cost_us"] - 1 for name in shared)
        seconds = [sum(results[name]["time_s"] for name in shared) for results in (new, old)]
        costs = f"cost {ratios[0]:+.2%} to {ratios[-1]:+.2%}, median {ratios[len(ratios) // 2]:+.2%}"
        print(f"{len(shared)} plans: {costs}; {seconds[0]:.1f} s, {seconds[1]:.1f} s before")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="results, and where a stopped gate goes on")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="compare, and exit 3 if something is dearer or slower")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--solver", help="instead of the default")
    parser.add_argument("--time-budget", type=float, default=60.0, help="most CPU seconds for a plan (default %(default)s)")
    parser.add_argument("--dearer", type=float, default=0.01, help="allowed, relative (default %(default)s)")
    parser.add_argument("--slower", type=float, default=0.1, help="allowed for noise, relative (default %(default)s)")
    parser.add_argument("--slower-s", type=float, default=0.3, help="allowed for noise, in seconds (default %(default)s)")
    args = parser.parse_args()
    time.monotonic = time.process_time  # the planner's clock: before it is imported
    known = json.loads(args.output.read_text()) if args.output and args.output.exists() else {}
    old = json.loads(args.against.read_text()) if args.against else {}
    results = {}
    for name, spec in suite().items():
        if args.only not in name:
            continue
        results[name] = known.get(name) or measure(spec, args.solver, args.time_budget)
        row = results[name]
        beside = f"  {row['cost_us'] / old[name]['cost_us'] - 1:+.2%}, {old[name]['time_s']:.2f} s before" if name in old else ""
        print(f"{name:40} {row['cost_us']:12.1f} us {row['time_s']:7.2f} s{beside}", flush=True)
        if args.output:
            args.output.write_text(json.dumps({**known, **results}, indent=1))
    missed = verdict(results, old, args)
    for line in missed:
        print(f"missed: {line}")
    return CHECK_FAILED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
