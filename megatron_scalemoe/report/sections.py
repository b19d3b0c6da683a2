"""From the files of a run to the page: which figures there are, what they say together, and what to be wary of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.report.collect import Run
from megatron_scalemoe.report.evaluate import CONTIGUOUS, Evaluation, evaluate_plans
from megatron_scalemoe.report.figures.common import Panel, Table, format_gap, format_ratio, format_us, report_style, to_svg
from megatron_scalemoe.report.figures.cost import best_policy, dispatch_panel, policies_finding, policies_panel, solvers_panel
from megatron_scalemoe.report.figures.load import link_panel, load_panel
from megatron_scalemoe.report.figures.plan import change_panel, convergence_panel, plan_change
from megatron_scalemoe.report.figures.topology import MAX_RANKS, bandwidth_panel
from megatron_scalemoe.report.figures.trace import trace_figure
from megatron_scalemoe.report.page import Section, Story, Tile
from megatron_scalemoe.report.training_runs import TrainingRun, in_order
from megatron_scalemoe.report.training_section import TRAINING, training_section, training_summary, training_warnings
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.traffic.summary import summarize
from megatron_scalemoe.traffic.trace import RoutingTrace
from megatron_scalemoe.units import format_bytes

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """The files that belong together: one trace, a topology of as many ranks, and the plans that fit."""

    trace: RoutingTrace | None
    topology: Topology | None
    plans: dict[str, PlacementPlan]
    warnings: list[str]


def tell(run: Run, cost: CostModel, *, progress: Progress) -> Story:
    """Computes and draws everything. progress: called with what comes next. Raises `ScaleMoEError` when matplotlib is missing."""
    with report_style():
        pass
    inputs = choose(run)
    warnings = list(inputs.warnings)
    evaluations = _evaluate(inputs, cost, warnings, progress)
    progress("figures")
    policies = _policy_groups(run)
    trainings = in_order(run.trainings)
    warnings += training_warnings(trainings)
    for result in (result for results in run.results.values() for result in results):
        if result.micro_batches not in (None, cost.micro_batches):
            made = (
                f"{result.name} was made for {result.micro_batches} micro-batches a step, what this page computes for {cost.micro_batches}"
            )
            warnings.append(f"{made}: replicas have other prices.")
    sections = [
        _unless_broken(TRAINING, "Training runs", lambda: training_section(trainings)),
        _unless_broken("policies", "What it gains", lambda: _policies(policies)),
        _unless_broken("balance", "Load of the ranks", lambda: _balance(evaluations)),
        _unless_broken("network", "The network", lambda: _network(inputs, evaluations)),
        _unless_broken("plans", "The plan", lambda: _plans(run, inputs, evaluations)),
        _unless_broken("traffic", "What the router asks for", lambda: _traffic(inputs.trace)),
        _unless_broken("measured", "Measured", lambda: _measured(run)),
    ]
    try:
        summary, tiles = _summary(run, trainings, policies, evaluations)
    except Exception as error:  # as in _unless_broken
        summary, tiles = f"These files give no summary: {type(error).__name__}: {error}", []
    return Story(summary, tiles, [s for s in sections if s is not None], warnings)


def _unless_broken(id: str, title: str, make: Callable[[], Section | None]) -> Section | None:
    """Values that no model foresaw (a number too large for an axis, a name that no font has) cost their section, not the page."""
    try:
        return make()
    except Exception as error:
        return Section(id, title, f"This section could not be made: {type(error).__name__}: {error}", [])


def choose(run: Run) -> Inputs:
    """The first trace, the first topology that is large enough for it, and the plans that fit; the rest is warned of."""
    warnings = []
    trace_name = next(iter(run.traces), None)
    trace = run.traces[trace_name] if trace_name else None
    if len(run.traces) > 1:
        warnings.append(f"The figures are of the trace {trace_name}; not used: {', '.join(list(run.traces)[1:])}.")
    large = {n: t for n, t in run.topologies.items() if trace is None or t.num_ranks >= trace.num_ranks}
    for name in run.topologies.keys() - large.keys():
        warnings.append(
            f"{name} has {run.topologies[name].num_ranks} GPUs, fewer than the {trace.num_ranks} ranks of {trace_name}: not used."
        )
    topology = next(iter(large.values()), None)
    if len(large) > 1:
        warnings.append(f"The figures are of the topology {next(iter(large))}; not used: {', '.join(list(large)[1:])}.")
    if trace is not None and topology is not None and topology.num_ranks > trace.num_ranks:
        warnings.append(
            f"{next(iter(large))} has {topology.num_ranks} GPUs, {trace_name} {trace.num_ranks} ranks: the first GPUs are used."
        )
        try:
            topology = topology.subset(trace.num_ranks)
        except ScaleMoEError as error:
            warnings.append(f"{next(iter(large))} is not used: {error}")
            topology = None
    plans = {}
    for name, plan in run.plans.items():
        size = (plan.num_layers, plan.num_ranks, plan.num_logical_experts)
        if trace is None or size == (trace.num_layers, trace.num_ranks, trace.num_experts):
            plans[name] = plan
        else:
            warnings.append(f"{name} is for {size[0]} layers, {size[1]} ranks and {size[2]} experts, {trace_name} is not: not evaluated.")
    return Inputs(trace, topology, plans, warnings + _foreign_plans(plans, trace, topology))


def _foreign_plans(plans: dict[str, PlacementPlan], trace: RoutingTrace | None, topology: Topology | None) -> list[str]:
    warnings = []
    for key, shown in (("trace", trace), ("topology", topology)):
        for name, plan in plans.items():
            made_from = plan.provenance.get(f"{key}_hash")
            if shown is not None and isinstance(made_from, str) and made_from != shown.content_hash:
                warnings.append(f"{name} was made from another {key} than the one shown.")
    return warnings


def _evaluate(inputs: Inputs, cost: CostModel, warnings: list[str], progress: Progress) -> list[Evaluation]:
    """Contiguous first, then the plans, the best one last of all."""
    if inputs.trace is None or inputs.trace.num_experts % inputs.trace.num_ranks:
        if inputs.trace is not None:
            warnings.append("The trace's experts are not a multiple of its ranks: no placement, no load of ranks.")
        return []

    def say(name: str) -> None:
        progress(f"load under {name}")

    try:
        found = evaluate_plans(inputs.trace, inputs.topology, inputs.plans, cost, progress=say)
    except ScaleMoEError as error:
        warnings.append(f"The network's load is left out: {error}")
        found = evaluate_plans(inputs.trace, None, inputs.plans, cost, progress=say)
    plans = sorted(found[1:], key=lambda e: e.max_over_mean.mean() if e.total_us is None else e.total_us, reverse=True)
    return [found[0], *plans]


def _first_and_best(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    return [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else list(evaluations)


def _policy_groups(run: Run) -> list[tuple[str, list[dict]]]:
    """(what it is, rows with the baseline first): one group per comparison, and one for all simulations against the same baseline."""
    groups = [(f"compare: {result.name}", result.rows) for result in run.results["compare"]]
    simulated: dict[tuple, list[dict]] = {}
    for result in run.results["simulate"]:
        baseline = result.rows[0] if len(result.rows) > 1 else {}
        same = tuple(sorted((k, v) for k, v in baseline.items() if k != "name"))
        simulated.setdefault(same, result.rows[:1] if baseline else []).append(result.rows[-1])
    return groups + [(f"simulate: {', '.join(sorted({row['name'] for row in rows}))}", _distinct(rows)) for rows in simulated.values()]


def _distinct(rows: list[dict]) -> list[dict]:
    """Policies of the same name told apart by their file."""
    names = [row["policy"] for row in rows]
    return [{**row, "policy": f"{row['policy']} ({row['name']})"} if names.count(row["policy"]) > 1 else row for row in rows]


def _policies(groups: list[tuple[str, list[dict]]]) -> Section | None:
    if not groups:
        return None
    panels = []
    for number, (source, rows) in enumerate(groups):
        panel = policies_panel(rows, f"policies-{number}")
        panels.append(dataclasses.replace(panel, note=f"{panel.note}From {source}."))
    lead = "Every recorded step replayed on the cluster, link by link; the first policy is what the others are measured against."
    return Section("policies", "What it gains", lead, panels)


def _balance(evaluations: list[Evaluation]) -> Section | None:
    if not evaluations:
        return None
    lead = "A layer is as slow as its busiest rank: max/mean 1 is perfect balance, 2 means that half of all compute time is waiting."
    return Section("balance", "Load of the ranks", lead, [load_panel(_first_and_best(evaluations))])


def _network(inputs: Inputs, evaluations: list[Evaluation]) -> Section | None:
    if inputs.topology is None:
        return None
    topology = inputs.topology
    nodes = f"{topology.num_nodes} node{'s' if topology.num_nodes > 1 else ''}"
    lead = f"{topology.name}: {topology.num_ranks:,} GPUs in {nodes}, {len(topology.links):,} directed links."
    shown = [e for e in _first_and_best(evaluations) if e.link_us is not None] if evaluations else []
    panels = [link_panel(shown, topology.links)] if shown else []
    if 1 < topology.num_ranks <= MAX_RANKS:
        panels.append(bandwidth_panel(topology, compute_routes(topology)))
    return Section("network", "The network", lead, panels)


def _plans(run: Run, inputs: Inputs, evaluations: list[Evaluation]) -> Section | None:
    searches = run.results["plan result"]
    if not inputs.plans and not searches:
        return None
    panels = []
    if inputs.plans:
        best = evaluations[-1].name if evaluations else next(iter(inputs.plans))
        plan = inputs.plans[best]
        contiguous = PlacementPlan.contiguous(plan.num_layers, plan.num_ranks, plan.num_logical_experts)
        fits = inputs.topology is not None and inputs.topology.num_ranks == plan.num_ranks
        nodes_G = inputs.topology.node_of_rank if fits else np.zeros(plan.num_ranks, dtype=np.int64)
        panels.append(change_panel(plan_change(CONTIGUOUS, contiguous, best, plan, nodes_G)))
    for number, result in enumerate(s for s in searches if s.curves):
        panels.append(convergence_panel(result.name, result.curves, number))
    tables = [table for table in (_plan_table(evaluations), _search_table(searches)) if table.rows]
    return Section("plans", "The plan", "", panels, tables)


def _plan_table(evaluations: Sequence[Evaluation]) -> Table:
    headers = ["placement", "replicas in all", "max/mean, mean of layers", "worst layer", "cost", "bytes scale-out"]
    rows = [
        [
            e.name,
            f"{e.plan.num_replicas.sum():,}",
            format_ratio(e.max_over_mean.mean()),
            format_ratio(e.max_over_mean.max()),
            "–" if e.total_us is None else format_us(e.total_us),
            "–" if e.bytes_scale_out is None else format_bytes(e.bytes_scale_out),
        ]
        for e in evaluations
    ]
    return Table(headers, rows, "Placements under the mean traffic of the trace, per micro-batch, as computed for this page")


def _search_table(searches: Sequence) -> Table:
    rows = []
    for result in searches:
        for row in result.rows:
            bound, gap = row.get("lower_bound_us"), row.get("gap")
            shown = ["–" if bound is None else format_us(bound), "–" if gap is None else format_gap(gap)]
            rows.append(
                [result.name, row["solver"], format_us(row["cost_us"]), *shown, f"{row['seconds']:.2f}" if "seconds" in row else "–"]
            )
    return Table(["result", "solver", "cost", "lower bound", "gap", "search, s"], rows, "Searches")


def _traffic(trace: RoutingTrace | None) -> Section | None:
    if trace is None:
        return None
    with report_style():
        figure = trace_figure(trace)
        title = figure.get_suptitle()
        figure.suptitle("")
        svg = to_svg(figure, "traffic")
    summary = summarize(trace)
    keys = [("gini", "Gini"), ("max_over_mean_experts", "max/mean of experts"), ("max_over_mean_ranks", "max/mean of ranks, contiguous")]
    keys += [("top5_share", "share of the 5 busiest"), ("dead_experts", "experts without tokens")]
    layers = [{"layer": "all, mean", **summary["total"]}, *summary["per_layer"]]
    rows = [[str(layer["layer"]), *("–" if layer[key] is None else f"{layer[key]:.3f}" for key, _ in keys)] for layer in layers]
    table = Table(["layer", *(header for _, header in keys)], rows, "The routing, mean over the recorded steps")
    alt = f"Heat map of the load of {trace.num_experts} experts in {trace.num_layers} layers, and the sorted loads. {title}."
    size = f"{trace.num_layers} MoE layers, {trace.num_ranks} ranks, {trace.num_experts} experts, top-{trace.topk}"
    lead = f"{trace.num_steps} recorded steps of {size}."
    return Section("traffic", "What the router asks for", lead, [Panel(title, alt, svg, table)])


def _measured(run: Run) -> Section | None:
    panels = [dispatch_panel(result.rows, result.name, i) for i, result in enumerate(run.results["bench dispatch"])]
    panels += [solvers_panel(result.rows, result.name, i) for i, result in enumerate(run.results["bench solvers"])]
    if not panels:
        return None
    return Section("measured", "Measured", "Benchmarks, the baseline always in the same run.", panels)


def _summary(
    run: Run, trainings: list[TrainingRun], groups: list[tuple[str, list[dict]]], evaluations: list[Evaluation]
) -> tuple[str, list[Tile]]:
    """What was gained against which baseline, by the best evidence that there is: measured before computed."""
    if trainings:
        return training_summary(trainings)
    if groups:
        rows = groups[0][1]
        return f"{policies_finding(rows)}.", _policy_tiles(rows[0], best_policy(rows))
    if len(evaluations) > 1:
        return _evaluated_summary(evaluations[0], evaluations[-1])
    if run.results["bench dispatch"]:
        return f"Measured: {dispatch_panel(run.results['bench dispatch'][0].rows, '', 0).title}.", []
    return "Nothing to compare yet: add a plan, or what `scalemoe compare --json` prints, to this directory.", []


def _policy_tiles(baseline: dict, best: dict) -> list[Tile]:
    shown = [("step", "step_us", format_us), ("max/mean rank load", "max_over_mean_mean", format_ratio)]
    shown += [("max/mean, p95", "max_over_mean_p95", format_ratio), ("bytes between nodes", "bytes_scale_out", format_bytes)]
    tiles = [
        Tile(name, show(best[key]), f"{show(baseline[key])} {baseline['policy']}")
        for name, key, show in shown
        if key in best and baseline.get(key)
    ]
    if "gap" in best:
        tiles.append(Tile("above the lower bound", format_gap(best["gap"]), "0 % is proven best"))
    return tiles


def _evaluated_summary(first: Evaluation, best: Evaluation) -> tuple[str, list[Tile]]:
    before, after = (float(e.max_over_mean.mean()) for e in (first, best))
    tiles = [Tile("max/mean rank load", format_ratio(after), f"{format_ratio(before)} {first.name}")]
    text = f"{best.name} brings max/mean rank load from {format_ratio(before)} to {format_ratio(after)}"
    if first.total_us is not None and best.total_us is not None:
        tiles.insert(0, Tile("step", format_us(best.total_us), f"{format_us(first.total_us)} {first.name}"))
        text += f", and the MoE layers of a micro-batch from {format_us(first.total_us)} to {format_us(best.total_us)}"
    if first.bytes_scale_out is not None and best.bytes_scale_out is not None:
        tiles.append(Tile("bytes between nodes", format_bytes(best.bytes_scale_out), f"{format_bytes(first.bytes_scale_out)} {first.name}"))
    return f"{text}, against the {first.name} placement (computed for the trace's mean traffic).", tiles
