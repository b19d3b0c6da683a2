"""The ranks of `scalemoe bench dispatch`: run by torchrun, writes its result as JSON from rank 0."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_scalemoe.dispatch.transport_choice import CallSizes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    args = _parse_args()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        from megatron_scalemoe.mcore import cpu_ranks

        cpu_ranks.install()
    backend = "nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=args.timeout))
    try:
        result = _bench(args, backend)
        if dist.get_rank() == 0:
            args.result_file.write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()


def _bench(args: argparse.Namespace, backend: str) -> dict:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_scalemoe.bench.measure import deduplicated_bytes, make_dispatchers, measure_dispatchers, same_bits
    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.dispatch.transport_choice import CallSizes

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.hidden,
        num_attention_heads=1,
        moe_ffn_hidden_size=args.hidden,  # no experts are built; Megatron warns without it
        num_moe_experts=args.experts,
        moe_router_topk=args.topk,
        moe_router_pre_softmax=True,  # top-1 needs it; nothing is routed here
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=ranks,
        add_bias_linear=False,
    )
    groups = get_default_pg_collection()
    routed = make_routed_tokens(args.tokens, args.hidden, args.experts, args.topk, args.skew, DTYPES[args.dtype], args.seed)
    names, ours = [name for name in args.dispatchers if name != "scalemoe"], []
    if "scalemoe" in args.dispatchers:
        sizes = CallSizes(args.tokens, args.hidden, routed.x.dtype, args.topk)
        ours = [f"scalemoe {transport}" for transport in _transports(args.transport, groups.tp_ep, sizes)]
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
    device = torch.cuda.get_device_name() if backend == "nccl" else "cpu"
    return {
        **result,
        "env": {"device": device, "backend": backend, "threads_per_rank": torch.get_num_threads(), "malloc": _malloc_settings()},
    }


def _transports(asked: list[str] | None, group: dist.ProcessGroup, sizes: CallSizes) -> list[str]:
    """What `scalemoe` is measured over: the transports asked for, which must be there, or all that are."""
    from megatron_scalemoe.dispatch.transport_choice import channel_of, check_transport
    from megatron_scalemoe.errors import ScaleMoEError

    for transport in asked or ():
        check_transport(group, transport)
        if (found := channel_of(group, transport, sizes).name) != transport:
            raise ScaleMoEError(f"--transport {transport} cannot be had", found=f"{found}; the line above says why")
    return asked or list(dict.fromkeys(["collective", channel_of(group, "auto", sizes).name]))


def make_routed_tokens(tokens: int, hidden: int, experts: int, top_k: int, skew: float, dtype: torch.dtype, seed: int):
    """This rank's tokens, each with `top_k` distinct experts drawn from a Zipf law with exponent `skew`: a `RoutedTokens`."""
    from megatron_scalemoe.bench.measure import RoutedTokens

    device = torch.cuda.current_device()
    generator = torch.Generator().manual_seed(seed * 1000 + dist.get_rank())
    popularity = torch.arange(1, experts + 1, dtype=torch.float64) ** -skew
    chosen = torch.multinomial(popularity.expand(tokens, -1), top_k, generator=generator)
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter(1, chosen, True)
    probs = torch.rand(tokens, experts, generator=generator) * routing_map
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return RoutedTokens(x.to(device), probs.to(device), routing_map.to(device))


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
