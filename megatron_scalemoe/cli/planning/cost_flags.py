"""The flags that make a `CostModel`, shared by every command that prices a placement."""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_scalemoe.cost.model import EXCHANGES, CostModel
from megatron_scalemoe.errors import ScaleMoEError

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(CostModel)}
_FROM_TRACE = ("hidden_size", "ffn_hidden_size")


def add_cost_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of `CostModel`. What is not given comes from the trace, else is `CostModel`'s default."""
    group = parser.add_argument_group("cost model", "one MoE layer, one micro-batch, forward and backward")

    def add(name: str, kind: type, metavar: str, text: str) -> None:
        flag = f"--{name.replace('_', '-').lower()}"
        group.add_argument(flag, dest=name, type=kind, metavar=metavar, help=f"{text} ({_DEFAULTS[name]})")

    add("hidden_size", int, "N", "numbers in a token's row: the trace's, if it has hidden_size")
    add("ffn_hidden_size", int, "N", "inner width of one expert: the trace's, if it has ffn_hidden_size")
    group.add_argument("--gated", action=argparse.BooleanOptionalAction, help="experts of three matrices, SwiGLU, or of two (--gated)")
    add("bytes_per_value", int, "N", "of a row and of a parameter, 2 for bf16")
    add("gpu_TFLOPs", float, "T", "what a rank reaches in the experts' matrix products, 10^12 operations a second")
    add("micro_batches", int, "N", "per optimizer step: replicas are refreshed once for all of them")
    text = "every rank to every rank; through a leader per node; between the nodes to the rank of equal local number"
    group.add_argument("--exchange", choices=EXCHANGES, help=f"{text} ({_DEFAULTS['exchange']})")
    text = "one row per (token, rank), or one per (token, expert) (--deduplicate)"
    group.add_argument("--deduplicate", action=argparse.BooleanOptionalAction, help=text)
    add("overlap", float, "F", "share of the shorter of communication and compute that hides behind the other, 0 to 1")
    add("exchange_overhead_us", float, "US", "fixed time of an exchange beside the links' latency")
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="results of `scalemoe bench dispatch` with different --tokens: --exchange-overhead-us is fitted to them",
    )


def cost_from_args(args: argparse.Namespace, meta: Mapping[str, object] | None = None) -> CostModel:
    """The `CostModel` of the flags; sizes that are not given come from a trace's `meta`. Raises `ScaleMoEError` on a bad value.

    args: of a parser with `add_cost_flags` and `common.add_output_flags`.
    """
    given = {name: getattr(args, name) for name in _DEFAULTS if getattr(args, name) is not None}
    recorded = {name: meta[name] for name in _FROM_TRACE if meta and name in meta}
    for name, value in recorded.items():
        if type(value) is not int:
            raise ScaleMoEError(f"the trace's meta: {name} must be an integer", found=repr(value)[:80], try_=_flag(name))
    with naming_flags():
        cost = CostModel(**{**recorded, **given})
    if args.calibration is None or "exchange_overhead_us" in given:
        return cost
    from megatron_scalemoe.cost.calibrate import fit_bench

    fit = fit_bench(args.calibration)
    if not args.quiet:
        worst = abs(fit.residuals).max()
        text = (
            f"{fit.overhead_us:.1f} us + a rank's bytes / {fit.bandwidth_GBps:.3g} GB/s, {fit.residuals.size} points, worst {worst:.0%} off"
        )
        print(f"scalemoe: calibration: one exchange takes {text}; links keep the topology's bandwidth", file=sys.stderr)
    return fit.apply(cost)


@contextlib.contextmanager
def naming_flags(prefix: str = "") -> Iterator[None]:
    """Errors about a field of what is made inside name the flag that sets it."""
    try:
        yield
    except ScaleMoEError as error:
        name, _, rest = str(error).partition(" ")
        if not rest.startswith("must "):
            raise
        problem, _, found = rest.partition("\n  found: ")
        raise ScaleMoEError(f"{_flag(prefix + name)} {problem}", found=found) from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-').lower()}"
