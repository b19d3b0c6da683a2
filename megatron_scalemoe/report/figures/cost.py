"""Figures of what policies cost and how fast dispatchers and solvers are: bars, the baseline first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_scalemoe.report.figures.common import (
    BASELINE_COLOR,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PLAN_COLOR,
    PURPLE,
    SKY,
    VERMILION,
    Panel,
    Table,
    bar_axes,
    drawing,
    format_gap,
    format_ratio,
    format_us,
    time_unit,
    to_svg,
)
from megatron_scalemoe.units import format_bytes

_PARTS = (
    ("dispatch", "dispatch_us", BLUE),
    ("combine", "combine_us", SKY),
    ("compute", "compute_us", ORANGE),
    ("replicas", "replica_us", PURPLE),
)
_COLUMNS = (
    ("step", "step_us", format_us),
    ("dispatch", "dispatch_us", format_us),
    ("combine", "combine_us", format_us),
    ("compute", "compute_us", format_us),
    ("replicas", "replica_us", format_us),
    ("max/mean, mean", "max_over_mean_mean", format_ratio),
    ("max/mean, p95", "max_over_mean_p95", format_ratio),
    ("bytes scale-out", "bytes_scale_out", format_bytes),
    ("waiting", "wait_share", lambda share: f"{share:.1%}"),
    ("bytes migrated", "migrated_bytes", format_bytes),
    ("lower bound", "lower_bound_us", format_us),
    ("gap", "gap", format_gap),
    ("search", "seconds", lambda seconds: f"{seconds:.2f} s"),
)
_MAX_BARS = 24


def policies_panel(rows: Sequence[dict], name: str) -> Panel:
    """Time of a step by component for each policy. rows: `policy` and the keys of `simulate`; the first is the baseline."""
    shown = list(rows[:_MAX_BARS])
    scale, unit = time_unit(max(row["step_us"] for row in shown))
    with drawing(10.4, 1.2 + 0.42 * len(shown)) as figure:
        axis = figure.subplots()
        at, left = np.arange(len(shown)), np.zeros(len(shown))
        for part, key, color in _PARTS:
            width = np.array([row.get(key, 0.0) for row in shown]) / scale
            if width.any():
                axis.barh(at, width, left=left, height=0.72, color=color, label=part)
            left += width
        steps = [row["step_us"] / scale for row in shown]
        axis.plot(steps, at, linestyle="none", marker="|", markersize=17, markeredgewidth=2, color=VERMILION, label="step")
        texts = [format_us(row["step_us"]) + (f", {_times(shown[0], row)}" if i else "") for i, row in enumerate(shown)]
        xlabel = f"{unit} per micro-batch, forward and backward of all MoE layers"
        bar_axes(axis, [row["policy"] for row in shown], xlabel, np.maximum(left, steps).tolist(), texts)
        handles, names = axis.get_legend_handles_labels()
        figure.legend(handles[1:] + handles[:1], names[1:] + names[:1], loc="outside upper left", ncols=5, borderaxespad=0)
        svg = to_svg(figure, name)
    title = policies_finding(rows)
    table = Table(*_columns(rows), "Policies, the baseline first")
    hides = any(row["step_us"] < 0.999 * sum(row.get(key, 0.0) for _, key, _ in _PARTS) for row in shown)
    note = "Red marks: the whole step, shorter than the sum of its parts because communication hides behind compute. " if hides else ""
    if len(shown) < len(rows):
        note += f"The first {len(shown)} of {len(rows)} policies are drawn. "
    return Panel(title, f"Stacked bars of the step's parts for {len(shown)} policies. {title}.", svg, table, note)


def policies_finding(rows: Sequence[dict]) -> str:
    """What the best policy gains on the first one."""
    baseline, best = rows[0], best_policy(rows)
    if best is baseline:
        text = f"{baseline['policy']} takes {format_us(baseline['step_us'])} for the MoE layers of a micro-batch"
        return f"{text}; no other policy is faster" if len(rows) > 1 else text
    text = f"{best['policy']} takes {format_us(best['step_us'])} where {baseline['policy']} takes {format_us(baseline['step_us'])}"
    if best["step_us"] > 0:
        text += f", {format_ratio(baseline['step_us'] / best['step_us'])}x as fast"
    return text + (f"; {format_gap(best['gap'])} above the lower bound" if "gap" in best else "")


def best_policy(rows: Sequence[dict]) -> dict:
    """The one with the shortest step; of equal ones the first."""
    return min(rows, key=lambda row: row["step_us"])


def _times(baseline: dict, row: dict) -> str:
    return f"{format_ratio(baseline['step_us'] / row['step_us'])}x" if row["step_us"] > 0 else "–"


def _columns(rows: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    present = [column for column in _COLUMNS if any(row.get(column[1]) for row in rows)]
    cells = [[row["policy"], *(show(row[key]) if key in row else "–" for _, key, show in present)] for row in rows]
    return ["policy", *(header for header, _, _ in present)], cells


def dispatch_panel(rows: Sequence[dict], file: str, number: int) -> Panel:
    """Measured dispatchers, median and 90th percentile; the first is the baseline."""
    shown = list(rows[:_MAX_BARS])
    baseline = shown[0]
    best = min(shown, key=lambda row: row["median_ms"])
    with drawing(10.4, 1.0 + 0.42 * len(shown)) as figure:
        axis = figure.subplots()
        median = [row["median_ms"] for row in shown]
        above = [max(0.0, row.get("p90_ms", row["median_ms"]) - row["median_ms"]) for row in shown]
        colors = [BASELINE_COLOR if row is baseline else PLAN_COLOR if row is best else GREY for row in shown]
        axis.barh(range(len(shown)), median, height=0.68, color=colors, xerr=[[0.0] * len(shown), above], ecolor=VERMILION, capsize=3)
        texts = [f"{row['median_ms']:.2f} ms" + (f", {row['ratio_to_stock']:.2f}x" if i else "") for i, row in enumerate(shown)]
        xlabel = "ms for dispatch + combine, forward and backward: median, and 90th percentile (whisker)"
        bar_axes(axis, [_dispatcher(row) for row in shown], xlabel, np.add(median, above).tolist(), texts)
        svg = to_svg(figure, f"dispatch-{number}")
    title = f"{_dispatcher(best)} takes {best['ratio_to_stock']:.2f}x the time of {baseline['dispatcher']}"
    if len(rows) == 1:
        title = f"{baseline['dispatcher']} takes {baseline['median_ms']:.2f} ms, and nothing beside it"
    elif best is baseline:
        title = f"No dispatcher is faster than {baseline['dispatcher']}"
    if best is not baseline and best.get("bytes_out") and baseline.get("bytes_out"):
        title += f" and sends {best['bytes_out'] / baseline['bytes_out']:.2f}x its bytes"
    headers = ["dispatcher", "median ms", "p90 ms", "time to stock", "bytes out", "max rel error"]
    cells = [
        [
            _dispatcher(row),
            f"{row['median_ms']:.2f}",
            f"{row['p90_ms']:.2f}" if "p90_ms" in row else "–",
            f"{row['ratio_to_stock']:.2f}",
            format_bytes(row["bytes_out"]) if "bytes_out" in row else "–",
            f"{row['max_rel_error']:.1e}" if "max_rel_error" in row else "–",
        ]
        for row in rows
    ]
    return Panel(title, f"Bars of {len(shown)} dispatchers. {title}.", svg, Table(headers, cells, f"Measured, {file}"), measured=True)


def _dispatcher(row: dict) -> str:
    """Its name, with the transport if that is not a collective."""
    return f"{row['dispatcher']} ({row['transport']})" if row.get("transport") in ("shm", "cuda") else row["dispatcher"]


def solvers_panel(rows: Sequence[dict], file: str, number: int) -> Panel:
    """Cost and time of solvers, each the mean over its runs; the first is the baseline."""
    names = list(dict.fromkeys(row["solver"] for row in rows))[:_MAX_BARS]
    runs = {name: [row for row in rows if row["solver"] == name] for name in names}
    cost = {name: float(np.mean([row["cost_us"] for row in runs[name]])) for name in names}
    seconds = {name: float(np.mean([row["seconds"] for row in runs[name]])) for name in names}
    best = min(names, key=cost.__getitem__)
    with drawing(10.4, 1.0 + 0.42 * len(names)) as figure:
        axis = figure.subplots()
        colors = [BASELINE_COLOR if name == names[0] else GREEN if name == best else GREY for name in names]
        axis.barh(range(len(names)), [cost[name] / 1e3 for name in names], height=0.68, color=colors)
        bounds = [row["lower_bound_us"] for name in names for row in runs[name] if "lower_bound_us" in row]
        if bounds:
            axis.axvline(float(np.mean(bounds)) / 1e3, color=VERMILION, linestyle="--", label="lower bound")
            axis.legend(loc="lower right")
        texts = [f"{format_us(cost[name])} in {seconds[name]:.2f} s" for name in names]
        bar_axes(axis, names, "cost, ms per micro-batch (mean over runs)", [cost[name] / 1e3 for name in names], texts)
        svg = to_svg(figure, f"solvers-{number}")
    gaps = {name: [row["gap"] for row in runs[name] if "gap" in row] for name in names}
    cells = [
        [
            name,
            str(len(runs[name])),
            format_us(cost[name]),
            f"{np.mean(gaps[name]):.2%}" if gaps[name] else "–",
            f"{max(gaps[name]):.2%}" if gaps[name] else "–",
            f"{seconds[name]:.2f}",
        ]
        for name in names
    ]
    table = Table(["solver", "runs", "mean cost", "mean gap", "largest gap", "mean seconds"], cells, f"Measured, {file}")
    title = f"No solver is cheaper than {best}" if len(names) > 1 else f"{best} finds placements that cost {format_us(cost[best])}"
    if best != names[0]:
        saved = 1 - cost[best] / cost[names[0]]
        title = f"{best} finds the cheapest placements, {saved:.0%} below {names[0]}, in {seconds[best]:.2g} s"
    return Panel(title, f"Bars of the cost of {len(names)} solvers. {title}.", svg, table)
