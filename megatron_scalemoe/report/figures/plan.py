"""Figures of a plan: what moves to get there, and how the search found it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.report.figures.common import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILION,
    Panel,
    Table,
    drawing,
    format_gap,
    format_ratio,
    format_us,
    to_svg,
    whole_ticks,
)
from megatron_scalemoe.report.results import Curve

_CURVE_POINTS, _MAX_CURVES = 240, 100
# A cost so many times its bound makes the differences near the bound invisible on a linear axis.
_LOG_FROM = 4
_BLOCKS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class PlanChange:
    """From one plan to another of the same layers, ranks and experts. Arrays are int64 [L].

    stay, inside, between: homes that stay on their rank, move inside their node, move to another node. added, dropped: replicas.
    moved_GG: int64 [G, G], homes that move from a rank (row) to another, over all layers.
    """

    old_name: str
    new_name: str
    stay: np.ndarray
    inside: np.ndarray
    between: np.ndarray
    added: np.ndarray
    dropped: np.ndarray
    moved_GG: np.ndarray


def plan_change(old_name: str, old: PlacementPlan, new_name: str, new: PlacementPlan, node_of_rank_G: np.ndarray) -> PlanChange:
    """Counts what differs. node_of_rank_G: int [G]."""
    ranks = old.num_ranks
    source_LE, target_LE = old.home_rank, new.home_rank
    moved_LE = source_LE != target_LE
    far_LE = node_of_rank_G[source_LE] != node_of_rank_G[target_LE]
    moved_GG = np.bincount((source_LE * ranks + target_LE)[moved_LE], minlength=ranks * ranks).reshape(ranks, ranks)
    added, dropped = [], []
    for layer in range(old.num_layers):
        replicas = []
        for plan in (old, new):
            hosts_EG = plan.hosts(layer)
            hosts_EG[np.arange(plan.num_logical_experts), plan.home_rank[layer]] = False
            replicas.append(hosts_EG)
        added.append((replicas[1] & ~replicas[0]).sum())
        dropped.append((replicas[0] & ~replicas[1]).sum())
    return PlanChange(
        old_name,
        new_name,
        stay=(~moved_LE).sum(axis=1),
        inside=(moved_LE & ~far_LE).sum(axis=1),
        between=far_LE.sum(axis=1),
        added=np.array(added),
        dropped=np.array(dropped),
        moved_GG=moved_GG,
    )


def change_panel(change: PlanChange) -> Panel:
    """Per layer, what stays and what moves; and between which ranks."""
    layers = np.arange(change.stay.size)
    with drawing(10.4, 3.7) as figure:
        bars, flow = figure.subplots(1, 2, width_ratios=(3, 2))
        bottom = np.zeros(layers.size)
        parts = [("home stays", change.stay, GREY), ("home moves inside its node", change.inside, SKY)]
        parts += [("home moves to another node", change.between, BLUE), ("replica added", change.added, ORANGE)]
        for name, count, color in parts:
            if count.any():
                bars.bar(layers, count, bottom=bottom, color=color, width=0.85, label=name)
            bottom += count
        bars.set(xlabel="MoE layer", ylabel="experts", title="what becomes of the experts", xlim=(-0.7, layers.size - 0.3))
        whole_ticks(bars.xaxis, bars.yaxis)
        figure.legend(*bars.get_legend_handles_labels(), loc="outside upper left", ncols=4, borderaxespad=0)
        _draw_flow(figure, flow, change.moved_GG)
        svg = to_svg(figure, "change")
    rows = [
        [str(layer), *(str(a[layer]) for a in (change.stay, change.inside, change.between, change.added, change.dropped))]
        for layer in layers
    ]
    headers = ["layer", "homes stay", "move inside the node", "move to another node", "replicas added", "replicas dropped"]
    table = Table(headers, rows, f"From {change.old_name} to {change.new_name}")
    alt = f"Stacked bars for each of {layers.size} layers, and a heat map of moves from rank to rank. {_change_title(change)}."
    return Panel(
        _change_title(change),
        alt,
        svg,
        table,
        "Homes carry parameters and optimizer state when they move; replicas are sent anew for each optimizer step.",
    )


def _draw_flow(figure, axis, moved_GG: np.ndarray) -> None:
    """Heat map of moves between ranks, or between blocks of ranks where there are many."""
    block = -(-len(moved_GG) // _BLOCKS)
    edges = np.arange(0, len(moved_GG), block)
    flow = np.add.reduceat(np.add.reduceat(moved_GG, edges, axis=0), edges, axis=1)
    end = edges.size * block - 0.5
    image = axis.imshow(
        np.ma.masked_equal(flow, 0), cmap="cividis", vmin=0, interpolation="nearest", extent=(-0.5, end, end, -0.5), aspect="auto"
    )
    axis.spines[["top", "right"]].set_visible(True)
    axis.set(xlabel="to rank", ylabel="from rank", title="homes that move" + (f", blocks of {block} ranks" if block > 1 else ""))
    whole_ticks(axis.xaxis, axis.yaxis)
    bar = figure.colorbar(image, ax=axis, label="homes, all layers")
    whole_ticks(bar.ax.yaxis)


def _change_title(change: PlanChange) -> str:
    homes, moved = int(change.moved_GG.sum() + change.stay.sum()), int(change.moved_GG.sum())
    added, dropped = int(change.added.sum()), int(change.dropped.sum())
    if not (moved or added or dropped):
        return f"{change.new_name} places the experts exactly as {change.old_name}"
    text = f"{change.new_name} moves {moved:,} of {homes:,} homes ({moved / homes:.0%}) from {change.old_name}"
    if far := int(change.between.sum()):
        text += f", {far:,} of them to another node"
    if added or dropped:
        text += f", and adds {added:,} replicas" + (f" (drops {dropped:,})" if dropped else "")
    return text


def convergence_panel(name: str, curves: Sequence[Curve], number: int) -> Panel:
    """How each layer's cost fell over its search, relative to its lower bound; in ms where the bounds are unknown."""
    bounded = all(curve.lower_bound_us for curve in curves)
    scales = [curve.lower_bound_us if bounded else 1e3 for curve in curves]
    end_s = max(curve.points[-1][0] for curve in curves)
    grid_s = np.linspace(0, end_s, _CURVE_POINTS)
    values = [np.array([cost for _, cost in curve.points]) / scale for curve, scale in zip(curves, scales, strict=True)]
    on_grid = [
        value[np.maximum(np.searchsorted([t for t, _ in curve.points], grid_s, side="right") - 1, 0)]
        for curve, value in zip(curves, values, strict=True)
    ]
    mean = np.mean(on_grid, axis=0)
    with drawing(10.4, 3.2) as figure:
        axis = figure.subplots()
        for line in on_grid[:_MAX_CURVES]:
            axis.step(grid_s, line, where="post", color=GREY, linewidth=0.8, alpha=0.6)
        axis.step(grid_s, mean, where="post", color=BLUE, linewidth=2.2, label=f"mean of {len(curves)} layers (grey: each)")
        if bounded:
            axis.axhline(1, color=VERMILION, linestyle="--", linewidth=1.4, label="lower bound: no placement is cheaper")
        axis.grid()
        unit = "cost / lower bound" if bounded else "cost, ms per micro-batch"
        axis.set(xlabel="time since the layer's search began, s", ylabel=unit, xlim=(0, end_s or 1))
        if bounded and max(v[0] for v in on_grid) > _LOG_FROM:
            axis.set_yscale("log")
            axis.set_yticks([t for t in (1, 1.5, 2, 3, 5, 8, 12, 20, 50, 100, 1000) if t <= max(v.max() for v in on_grid)])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper left", ncols=2, borderaxespad=0)
        svg = to_svg(figure, f"convergence-{number}")
    rows = [
        [
            str(curve.layer),
            format_us(curve.points[0][1]),
            format_us(curve.points[-1][1]),
            format_us(curve.lower_bound_us) if curve.lower_bound_us else "–",
            format_gap(curve.points[-1][1] / curve.lower_bound_us - 1) if curve.lower_bound_us else "–",
            f"{curve.points[-1][0]:.3f}",
        ]
        for curve in curves
    ]
    table = Table(["layer", "first cost", "last cost", "lower bound", "gap", "search, s"], rows, f"Search of {name}")
    what = f"{format_ratio(mean[0])}x to {format_ratio(mean[-1])}x its lower bound" if bounded else f"{mean[0]:.3g} ms to {mean[-1]:.3g} ms"
    title = f"The search brought the mean layer from {what}; the longest took {end_s:.2g} s"
    if mean[-1] > 0.999 * mean[0]:
        title = f"The search of {end_s:.2g} s a layer found nothing better than its start"
    note = f"{name}. Costs at the ports, which the search minimises; the links have the final word elsewhere on this page."
    return Panel(title, f"Line chart of cost over search time. {title}.", svg, table, note)
