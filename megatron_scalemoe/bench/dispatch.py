"""The ranks of `scalemoe bench dispatch`: run by torchrun, writes its result as JSON from rank 0."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_scalemoe.bench.routed_tokens import DTYPES, make_routed_tokens
from megatron_scalemoe.bench.worker import describe_device, run_worker, use_megatron

if TYPE_CHECKING:
    from megatron_scalemoe.dispatch.channels import DispatchSizes, Peers


def main() -> None:
    args = _parse_args()
    use_megatron()
    run_worker(functools.partial(_bench, args), args.result_file, args.timeout)


def _bench(args: argparse.Namespace) -> dict:
    from megatron_scalemoe.bench.measure import deduplicated_bytes, measure_dispatchers, same_bits
    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.dispatch.channels import DispatchSizes
    from megatron_scalemoe.mcore.layers.token_dispatcher import peers_of
    from megatron_scalemoe.mcore.stock import expert_parallel_groups, make_dispatchers, one_layer_config

    ranks = dist.get_world_size()
    groups = expert_parallel_groups(ranks)
    seed, device = 1000 * args.seed + dist.get_rank(), torch.cuda.current_device()
    routed = make_routed_tokens(args.tokens, args.hidden, args.experts, args.topk, args.skew, DTYPES[args.dtype], seed, device)
    names, ours = [name for name in args.dispatchers if name != "scalemoe"], []
    if "scalemoe" in args.dispatchers:
        sizes = DispatchSizes(args.experts, args.topk, 1, *routed.x.shape, routed.x.dtype)
        ours = [f"scalemoe {transport}" for transport in _transports(args.transport, peers_of(groups.tp_ep), sizes)]
    config = one_layer_config(args.hidden, args.experts, args.topk, ranks)
    dispatchers = make_dispatchers(names + ours, config, ScaleMoEConfig(), groups)
    measured = measure_dispatchers(dispatchers, [routed], iters=args.iters, warmup=args.warmup)
    rows = []
    for name, measurement in measured.items():
        dispatcher, _, transport = name.partition(" ")
        run = {"dispatcher": dispatcher, "transport": transport or "collective", "ranks": ranks, "dtype": args.dtype}
        ratio = measurement.median_ms / measured["alltoall"].median_ms
        rows.append({**run, "ratio_to_stock": ratio, **dataclasses.asdict(measurement)})
    result = {"rows": rows, "deduplicated_bytes_dispatch": deduplicated_bytes(routed, groups.ep)}
    if len(ours) > 1:
        result["transports_same_bits"] = same_bits([dispatchers[name] for name in ours], [routed])
    return {**result, "env": {**describe_device(), "backend": dist.get_backend(), "malloc": _malloc_settings()}}


def _transports(asked: list[str] | None, peers: Peers, sizes: DispatchSizes) -> list[str]:
    """What `scalemoe` is measured over: the transports asked for, which must be there, or all that are."""
    from megatron_scalemoe.dispatch.channels import channel_of, check_transport
    from megatron_scalemoe.errors import ScaleMoEError

    for transport in asked or ():
        check_transport(peers, transport)
        if (found := channel_of(peers, transport, sizes).name) != transport:
            raise ScaleMoEError(f"--transport {transport} cannot be had", found=f"{found}; the line above says why")
    return asked or list(dict.fromkeys(["collective", channel_of(peers, "auto", sizes).name]))


def _malloc_settings() -> dict[str, str]:
    """Page faults of fresh buffers are a large part of the time on CPU ranks, and these variables decide them."""
    return {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "THP_", "LD_PRELOAD"))}


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("tokens", "hidden", "experts", "topk", "ranks", "iters", "warmup", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("skew", "timeout"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--dispatchers", nargs="+", required=True)
    parser.add_argument("--transport", nargs="+")
    parser.add_argument("--result-file", type=pathlib.Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
