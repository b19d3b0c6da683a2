"""Our planner beside DeepSeek's EPLB, on the same loads, the same slots and the same cost model.

    git clone https://github.com/deepseek-ai/EPLB && python tools/compare_eplb.py EPLB            (needs torch: the train extra)

For each case: max/mean rank load and scale-out bytes of the dispatch per step (replicas' own parameters not counted: both have as many
slots), of EPLB's two policies (experts in groups, packed to nodes first; or the whole cluster at once), each with its tokens spread evenly
over an expert's copies, as EPLB means them to be, and with our per-step split; and of our placement with our split.

The bars, in every layer of every run: max/mean never above EPLB's best by more than 0.5 %; and over a run fewer scale-out bytes than
EPLB's least, wherever experts are co-activated or sources prefer experts. Exit code 3 if one is missed.
"""

import argparse
import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

from megatron_scalemoe.cli.common import CHECK_FAILED, OK, format_table
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.objective import slots_of_hosts
from megatron_scalemoe.placement.solve import solve_trace
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.topology.ports import two_level_ports
from megatron_scalemoe.traffic.matrices import distinct_factor, rows_between_ranks
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import RoutingTrace

OURS = "scalemoe"
BALANCE_TOLERANCE = 1.005
# Slow experts, and replicas sent once for many micro-batches: balance is worth more than any saving of bytes, as in EPLB, which knows
# loads only.
COST = CostModel(hidden_size=4096, gpu_TFLOPs=10.0, micro_batches=64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison. `local`: bytes can be saved, because experts are co-activated or sources prefer experts."""

    name: str
    nodes: int
    ranks: int
    experts: int
    replicas: int
    groups: int
    local: bool
    traffic: dict


CASES = [
    Case("zipf, 64 experts", 4, 16, 64, 16, 8, False, {"kind": "zipf", "topk": 2, "skew": 0.8}),
    Case("zipf, 256 experts", 8, 64, 256, 64, 8, False, {"kind": "zipf", "topk": 8, "skew": 0.6}),
    Case("recorded shape, 1.5x", 2, 16, 32, 16, 4, False, {"kind": "recorded", "topk": 2}),
    Case("recorded shape, 2x", 2, 16, 32, 32, 4, False, {"kind": "recorded", "topk": 2}),
    Case("no replicas", 4, 16, 64, 0, 8, False, {"kind": "zipf", "topk": 2, "skew": 0.4}),
    Case("clustered", 4, 16, 64, 16, 8, True, {"kind": "clustered", "topk": 2, "skew": 0.6}),
    Case("clustered, no replicas", 4, 16, 64, 0, 8, True, {"kind": "clustered", "topk": 2, "skew": 0.4}),
    Case("clustered, 256 experts", 8, 64, 256, 64, 8, True, {"kind": "clustered", "topk": 8, "skew": 0.6}),
]


def load_eplb(checkout: Path):
    """The `eplb` module of a checkout, without installing it."""
    source = checkout / "eplb.py"
    if not source.is_file():
        raise ScaleMoEError("the path must be an EPLB checkout", found=f"no {source}", try_="git clone https://github.com/deepseek-ai/EPLB")
    spec = importlib.util.spec_from_file_location("eplb", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def eplb_shares(eplb, loads_LE: np.ndarray, case: Case, groups: int) -> np.ndarray:
    """float64 [L, E, G]: the part of each expert's tokens that EPLB means each rank to compute: evenly over the copies."""
    import torch

    slots_LP, _, copies_LE = eplb.rebalance_experts(
        torch.from_numpy(loads_LE), case.experts + case.replicas, groups, case.nodes, case.ranks
    )
    slots_LP, copies_LE = slots_LP.numpy(), copies_LE.numpy()
    shares = np.zeros((len(loads_LE), case.experts, case.ranks))
    rank_P = np.arange(slots_LP.shape[1]) // (slots_LP.shape[1] // case.ranks)
    for layer, slots_P in enumerate(slots_LP):
        np.add.at(shares[layer], (slots_P, rank_P), 1.0 / copies_LE[layer, slots_P])
    return shares


def scale_out_bytes(rows_GG: np.ndarray, node_of_rank_G: np.ndarray) -> float:
    return float(rows_GG[node_of_rank_G[:, None] != node_of_rank_G].sum()) * COST.row_bytes


def measure_shares(share_EG: np.ndarray, traffic, node_of_rank_G: np.ndarray) -> np.ndarray:
    """[max/mean, scale-out bytes] when every source splits its tokens by the same shares."""
    selections_GG = traffic.counts @ share_EG
    load_G = selections_GG.sum(axis=0)
    return np.array([load_G.max() / load_G.mean(), scale_out_bytes(selections_GG * distinct_factor(share_EG, traffic), node_of_rank_G)])


def measure_split(slots_P: np.ndarray, traffic, node_of_rank_G: np.ndarray) -> np.ndarray:
    """[max/mean, scale-out bytes] when tokens are split by our per-step split."""
    ranks = node_of_rank_G.size
    tokens_GP = split_tokens(np.rint(traffic.counts).astype(np.int64), slots_P, ranks, node_of_rank_G)
    load_G = tokens_GP.sum(axis=0).reshape(ranks, -1).sum(axis=1)
    return np.array([load_G.max() / load_G.mean(), scale_out_bytes(rows_between_ranks(tokens_GP, slots_P, ranks, traffic), node_of_rank_G)])


def compare(eplb, case: Case, trace: RoutingTrace, time_budget_s: float) -> dict[str, np.ndarray]:
    """Per way of placing: float64 [L, 2], max/mean and scale-out bytes of each layer."""
    ports = two_level_ports(case.nodes, case.ranks // case.nodes)
    node_G, layers = ports.node_of_rank, [trace.layer(layer) for layer in range(trace.num_layers)]
    loads_LE, results = np.stack([layer.counts.sum(axis=0) for layer in layers]), {}
    # One group does not divide over the nodes: EPLB then takes the cluster as a whole.
    for policy, groups in (("groups", case.groups), ("global", 1)):
        pairs = list(zip(eplb_shares(eplb, loads_LE, case, groups), layers, strict=True))
        results[f"EPLB {policy}"] = np.array([measure_shares(share, layer, node_G) for share, layer in pairs])
        results[f"EPLB {policy} + split"] = np.array([measure_split(slots_of_hosts(share > 0), layer, node_G) for share, layer in pairs])
    plan = solve_trace(trace, ports, COST, replicas=case.replicas, time_budget_s=time_budget_s).plan
    results[OURS] = np.array([measure_split(plan.physical_to_logical[i], layer, node_G) for i, layer in enumerate(layers)])
    return results


def failures(case: Case, results: dict[str, np.ndarray]) -> list[str]:
    """Which bars are missed, in words."""
    ours, theirs = results[OURS], np.stack([values for name, values in results.items() if name != OURS])
    missed = []
    worst = float((ours[:, 0] / theirs[:, :, 0].min(axis=0)).max())
    if worst > BALANCE_TOLERANCE:
        missed.append(f"{case.name}: max/mean {worst:.4f} x EPLB's best in a layer")
    if case.local and not ours[:, 1].sum() < theirs[:, :, 1].sum(axis=1).min():
        missed.append(f"{case.name}: scale-out bytes are not below EPLB's least")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eplb", type=Path, help="a checkout of https://github.com/deepseek-ai/EPLB")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--time-budget", type=float, default=60.0, help="most seconds for each of our plans")
    args = parser.parse_args()
    eplb = load_eplb(args.eplb)
    rows, missed = [], []
    for case in CASES:
        runs = []
        start = time.monotonic()
        for seed in range(args.seeds):
            trace = synthesize(
                ranks=case.ranks, experts=case.experts, layers=args.layers, steps=4, tokens_per_rank=4096, seed=seed, **case.traffic
            )
            runs.append(compare(eplb, case, trace, args.time_budget))
            missed += failures(case, runs[-1])
        print(f"{case.name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
        for name in runs[0]:
            values = np.concatenate([run[name] for run in runs])
            baseline = np.concatenate([run["EPLB groups"] for run in runs])
            saved = 1 - values[:, 1].sum() / baseline[:, 1].sum()
            rows.append(
                [
                    case.name,
                    name,
                    f"{values[:, 0].mean():.3f}",
                    f"{values[:, 0].max():.3f}",
                    f"{values[:, 1].mean() / 2**20:.1f}",
                    f"{saved:.1%}",
                ]
            )
    print(format_table(["case", "placement", "max/mean", "worst", "scale-out MiB", "fewer bytes"], rows))
    for line in missed:
        print(f"missed: {line}")
    return CHECK_FAILED if missed else OK


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ScaleMoEError as error:
        sys.exit(f"error: {error}")
