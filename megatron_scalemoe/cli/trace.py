"""`scalemoe trace`: make, convert and look at routing traces."""

import argparse
import sys
import time
from pathlib import Path

from megatron_scalemoe.cli.common import OK, add_output_flags, check_output, emit, format_table, naming_flags, print_result
from megatron_scalemoe.cli.file_kinds import wanted
from megatron_scalemoe.errors import ScaleMoEError

KINDS = ("zipf", "clustered", "bursty", "single_hot", "recorded")
FIGURE_SUFFIXES = (".svg", ".png", ".pdf")
# (key of the summary, header, format)
COLUMNS = (
    ("gini", "gini", ".2f"),
    ("max_over_mean_experts", "max/mean experts", ".2f"),
    ("max_over_mean_ranks", "max/mean ranks", ".2f"),
    ("top5_share", "top 5", ".1%"),
    ("dead_experts", "dead", ".1%"),
    ("drift_1", "drift 1", ".4f"),
    ("drift_5", "drift 5", ".4f"),
    ("drift_50", "drift 50", ".4f"),
    ("drift_noise", "(noise)", ".4f"),
    ("source_variation", "source", ".4f"),
    ("source_noise", "(noise)", ".4f"),
    ("local_share", "local", ".2%"),
)
LEGEND = """\
max/mean: busiest over mean load of the experts, and of the ranks under contiguous placement. dead: experts without a token.
drift N: fraction of the load that is elsewhere N steps later. source: how much one rank's choices differ from all ranks'.
noise: what drift 1 and source would be if only the draw of the tokens differed. local: choices that stay on their rank."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds `trace synth`, `trace convert` and `trace summary` to the command line."""
    parser = commands.add_parser("trace", help="make, convert and look at routing traces", allow_abbrev=False, description=__doc__)
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_synth(subcommands)
    _add_convert(subcommands)
    summary = subcommands.add_parser(
        "summary", help="skew, drift and locality of a trace", allow_abbrev=False, description="Skew, drift and locality of a trace."
    )
    summary.add_argument("trace", metavar="FILE", type=Path, help="the trace, an npz file")
    summary.add_argument("--plot", metavar="FILE", type=Path, help=f"draw the loads ({', '.join(FIGURE_SUFFIXES)})")
    add_output_flags(summary)
    summary.set_defaults(handler=run_summary)


def _add_synth(subcommands: argparse._SubParsersAction) -> None:
    about = "Make a synthetic trace. What is not given takes the kind's default."
    synth = subcommands.add_parser("synth", help="make a synthetic trace", allow_abbrev=False, description=about)
    synth.add_argument(
        "--kind",
        choices=KINDS,
        default="zipf",
        help="zipf (default): skewed; clustered: experts and ranks with affinities; bursty: sudden demand; "
        "single_hot: one expert takes all; recorded: like a public training trace without balance loss",
    )
    for name, what in (
        ("ranks", "expert-parallel ranks, the sources of tokens (8; recorded 16)"),
        ("experts", "logical experts (64; recorded 32)"),
        ("layers", "MoE layers (1; recorded 8)"),
        ("topk", "experts per token (2)"),
        ("steps", "recorded steps (8; recorded 51)"),
        ("tokens-per-rank", "tokens of one rank in one step (4096; recorded 2048)"),
        ("groups", "groups of experts, with affinities (experts / 8)"),
        ("interval", "iterations between recorded steps (1; recorded 10)"),
    ):
        synth.add_argument(f"--{name}", metavar="N", type=int, help=what)
    synth.add_argument("--skew", metavar="A", type=float, help="Zipf exponent: 0 uniform, 0.8 as in ScaleMoE's paper, 1.5 extreme (0.8)")
    synth.add_argument("--drift", metavar="TV", type=float, help="fraction of the load that moves from step to step (0.02)")
    synth.add_argument("--affinity", metavar="A", type=float, help="0..1, experts of a group are chosen together (0; clustered 0.7)")
    synth.add_argument("--source-affinity", metavar="A", type=float, help="0..1, a rank prefers its own group (0; clustered 0.3)")
    synth.add_argument("--seed", metavar="N", type=int, default=0, help="the same seed makes the same trace (0)")
    _add_coactivation(synth)
    _add_trace_output(synth)
    synth.set_defaults(handler=run_synth)


def _add_convert(subcommands: argparse._SubParsersAction) -> None:
    about = "Convert what Megatron-LM recorded with --moe-routing-trace-path or --save-tokens-per-expert-interval."
    convert = subcommands.add_parser("convert", help="convert Megatron-LM's records", allow_abbrev=False, description=about)
    convert.add_argument("directory", metavar="DIR", type=Path, help="the directory with the ranks' jsonl files")
    convert.add_argument("--experts", metavar="N", type=int, help="logical experts (a routing trace does not name them)")
    convert.add_argument("--topk", metavar="N", type=int, help="experts per token (tokens per expert do not name it)")
    convert.add_argument("--ranks", metavar="N", type=int, help="size of the expert-parallel group (all ranks of a pipeline stage)")
    convert.add_argument("--pipeline-stages", metavar="N", type=int, default=1, help="pipeline-parallel size of the job (1)")
    _add_coactivation(convert)
    _add_trace_output(convert)
    convert.set_defaults(handler=run_convert)


def _add_coactivation(parser: argparse.ArgumentParser) -> None:
    what = "with co-activation, the pairs of experts chosen together (on where it takes up to 64 MiB)"
    parser.add_argument("--coactivation", action=argparse.BooleanOptionalAction, help=what)


def _add_trace_output(parser: argparse.ArgumentParser) -> None:
    add_output_flags(parser, "the trace to write (npz)")
    for action in parser._actions:
        action.required |= action.dest == "output"


def run_synth(args: argparse.Namespace) -> int:
    """Makes, writes and summarises a synthetic trace."""
    _check_trace_output(args)
    from megatron_scalemoe.traffic.synthetic import synthesize

    start = time.perf_counter()
    names = ("ranks", "experts", "layers", "topk", "steps", "tokens_per_rank", "skew", "drift", "seed", "affinity", "source_affinity")
    values = {name: getattr(args, name) for name in (*names, "groups", "interval", "coactivation")}
    with naming_flags():
        trace = synthesize(args.kind, **values)
    return _write(args, trace, start)


def run_convert(args: argparse.Namespace) -> int:
    """Reads Megatron's records, writes and summarises the trace."""
    _check_trace_output(args)
    from megatron_scalemoe.traffic.megatron_jsonl import read_megatron

    start = time.perf_counter()
    trace = read_megatron(
        args.directory,
        num_ranks=args.ranks,
        num_experts=args.experts,
        topk=args.topk,
        pipeline_stages=args.pipeline_stages,
        coactivation=args.coactivation,
        progress=None if args.quiet else lambda text: print(text, file=sys.stderr),
    )
    left_out = trace.meta["incomplete_iterations"]
    if left_out and not args.quiet:
        print(f"left out {left_out} iterations that some rank or layer lacks", file=sys.stderr)
    return _write(args, trace, start)


def _check_trace_output(args: argparse.Namespace) -> None:
    if args.output.suffix != ".npz":
        raise ScaleMoEError("--output: a trace is an npz file", found=args.output, try_=f"-o {args.output.with_suffix('.npz')}")
    check_output(args.output, force=args.force)


def _write(args: argparse.Namespace, trace, start: float) -> int:
    from megatron_scalemoe.traffic.summary import summarize
    from megatron_scalemoe.traffic.trace import save_trace

    save_trace(trace, args.output, force=args.force)
    if not args.quiet:
        print(f"{args.output}: written in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    summary = {"file": str(args.output), **summarize(trace)}
    print_result(args, summary, format_summary(summary, per_layer=False))
    return OK


def run_summary(args: argparse.Namespace) -> int:
    """Prints the statistics of a trace file; draws it with `--plot`."""
    check_output(args.output, force=args.force)
    if args.plot is not None:
        if args.plot.suffix not in FIGURE_SUFFIXES:
            raise ScaleMoEError(f"--plot: must end in {', '.join(FIGURE_SUFFIXES)}", found=args.plot)
        check_output(args.plot, force=args.force, flag="--plot")
    from megatron_scalemoe.traffic.summary import summarize
    from megatron_scalemoe.traffic.trace import load_trace

    with wanted("trace", args.trace, "trace summary"):
        trace = load_trace(args.trace)
    summary = {"file": str(args.trace), **summarize(trace)}
    if args.plot is not None:
        _plot(trace, args)
    emit(args, summary, format_summary(summary, per_layer=True))
    return OK


def _plot(trace, args: argparse.Namespace) -> None:
    import io

    from megatron_scalemoe.files import write_atomically
    from megatron_scalemoe.report.figures.trace import trace_figure

    buffer = io.BytesIO()
    trace_figure(trace).savefig(buffer, format=args.plot.suffix[1:], dpi=150)
    write_atomically(args.plot, buffer.getvalue(), force=args.force)
    if not args.quiet:
        print(f"{args.plot}: written", file=sys.stderr)


def format_summary(summary: dict, *, per_layer: bool) -> str:
    """One line on the size, and a table: a line per layer if `per_layer`, then the mean."""
    pairs = "with co-activation" if summary["coactivation"] else "without co-activation"
    head = (
        f"{summary['file']}: {summary['steps']} steps, {summary['layers']} layers, {summary['ranks']} ranks, {summary['experts']} experts, "
        f"top-{summary['topk']}, {summary['tokens_per_step']:.0f} tokens per step, {pairs}"
    )
    if summary["idle_steps"] or summary["empty_layers"]:
        head += f"\nLeft out of the means, as without tokens: idle steps {summary['idle_steps']}, empty layers {summary['empty_layers']}"
    columns = [c for c in COLUMNS if summary["total"][c[0]] is not None]
    layers = summary["per_layer"] if per_layer and summary["layers"] > 1 else []
    rows = [[str(one["layer"]), *("-" if one[key] is None else format(one[key], spec) for key, _, spec in columns)] for one in layers]
    rows.append(["mean" if summary["layers"] > 1 else "0", *(format(summary["total"][key], spec) for key, _, spec in columns)])
    return "\n\n".join([head, format_table(["layer", *(title for _, title, _ in columns)], rows), LEGEND])
