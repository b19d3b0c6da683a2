"""Figures of where the load is: on the ranks in every layer, and on the links."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_scalemoe.report.evaluate import Evaluation
from megatron_scalemoe.report.figures.common import (
    BASELINE_COLOR,
    PLAN_COLOR,
    Panel,
    Table,
    drawing,
    format_ratio,
    format_us,
    label,
    time_unit,
    to_svg,
    whole_ticks,
)

_TOP_LINKS = 10
_CURVE_POINTS = 300


def load_panel(evaluations: Sequence[Evaluation]) -> Panel:
    """Heat maps, layer x rank, of one or two evaluations: load relative to the layer's mean, on one scale."""
    from matplotlib.colors import LogNorm

    ratios = [e.load / np.maximum(e.load.mean(axis=1, keepdims=True), 1e-300) for e in evaluations]
    layers, ranks = ratios[0].shape
    top = max(2.0, *(float(r.max()) for r in ratios))
    with drawing(5.4 * len(ratios) + 0.6, float(np.clip(0.09 * layers, 1.1, 4.2)) + 1.2) as figure:
        norm = LogNorm(1 / top, top, clip=True)
        axes = figure.subplots(1, len(ratios), squeeze=False, sharey=True)[0]
        for axis, evaluation, ratio in zip(axes, evaluations, ratios, strict=True):
            image = axis.imshow(ratio, aspect="auto", interpolation="nearest", norm=norm, cmap="cividis")
            worst = format_ratio(float(evaluation.max_over_mean.max()))
            axis.set(xlabel="rank", title=f"{label(evaluation.name)}: worst layer {worst}")
            whole_ticks(axis.xaxis, axis.yaxis)
        axes[0].set_ylabel("MoE layer")
        bar = figure.colorbar(image, ax=axes, pad=0.015)
        ticks = [t for t in (1 / 64, 1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16, 64, 256, 1024) if 1 / top <= t <= top]
        bar.set_ticks(ticks, labels=[f"1/{round(1 / t)}" if t < 1 else f"{t:.0f}" for t in ticks])
        bar.ax.minorticks_off()
        bar.set_label("rank's load / layer's mean")
        svg = to_svg(figure, "load")
    alt = f"Heat maps of {layers} layers by {ranks} ranks. " + "; ".join(_in_words(e) for e in evaluations) + "."
    note = "Selections (tokens x chosen experts) of each rank, mean over the recorded steps; the brightest rank of a layer is waited for."
    return Panel(_load_title(evaluations), alt, svg, _load_table(evaluations), note)


def _load_title(evaluations: Sequence[Evaluation]) -> str:
    first, last = evaluations[0], evaluations[-1]
    layer = int(first.max_over_mean.argmax())
    worst, rank = first.max_over_mean[layer], int(first.load[layer].argmax())
    if not first.load.any():
        return "The trace holds no tokens"
    if worst < 1.005:
        return f"All ranks carry the same load under {first.name}"
    text = f"In layer {layer} all wait for rank {rank}, which gets {format_ratio(worst)}x the mean load"
    if first is last:
        return f"{text} under the {first.name} placement"
    return f"{text}; with {last.name} the worst of all layers is {format_ratio(last.max_over_mean.max())}x"


def _in_words(e: Evaluation) -> str:
    return (
        f"{e.name}: max/mean {format_ratio(e.max_over_mean.mean())} on average over layers, {format_ratio(e.max_over_mean.max())} at worst"
    )


def _load_table(evaluations: Sequence[Evaluation]) -> Table:
    headers = ["layer", *(text for e in evaluations for text in (f"max/mean, {e.name}", "busiest rank"))]
    rows = [
        [str(layer), *(text for e in evaluations for text in (format_ratio(e.max_over_mean[layer]), str(e.load[layer].argmax())))]
        for layer in range(len(evaluations[0].load))
    ]
    return Table(headers, rows, "Load of the busiest rank of each layer over the mean rank's")


def link_panel(evaluations: Sequence[Evaluation], links: Sequence[tuple[str, str]]) -> Panel:
    """The busiest links of one or two evaluations (baseline first), and how busy all are. links: (source, target) of each of M."""
    times = [e.link_us for e in evaluations]
    colors = [BASELINE_COLOR, PLAN_COLOR][: len(times)]
    order = np.argsort(-np.max(times, axis=0), kind="stable")[:_TOP_LINKS]
    names = [f"{source} → {target}" for source, target in links]
    scale, unit = time_unit(float(np.max(times)))
    with drawing(10.4, 1.5 + 0.3 * max(len(order), 6)) as figure:
        bars, curve = figure.subplots(1, 2, width_ratios=(3, 2))
        height = 0.8 / len(times)
        for index, (evaluation, time_us, color) in enumerate(zip(evaluations, times, colors, strict=True)):
            at = np.arange(len(order)) + (index - (len(times) - 1) / 2) * height
            bars.barh(at, time_us[order] / scale, height=height * 0.94, color=color, label=label(evaluation.name))
            rank, busy = _sorted_curve(time_us)
            curve.plot(rank, busy / scale, color=color, linewidth=2, linestyle="-" if index else "--")
        bars.set_yticks(range(len(order)), [label(names[i]) for i in order], fontsize=8.5)
        bars.invert_yaxis()
        bars.grid(axis="x")
        bars.set(xlabel=f"busy, {unit} per micro-batch", title=f"the {len(order)} busiest links")
        figure.legend(*bars.get_legend_handles_labels(), loc="outside upper left", ncols=2, borderaxespad=0)
        curve.grid()
        curve.set(
            xlabel="links, the busiest first (%)", ylabel=f"busy, {unit} per micro-batch", title=f"all {len(links):,} links", ylim=(0, None)
        )
        svg = to_svg(figure, "links")
    rows = [[names[i], *(f"{time_us[i] / scale:.3f}" for time_us in times)] for i in order]
    table = Table(
        ["link", *(f"{e.name}, {unit}" for e in evaluations)], rows, "Busiest links: all dispatches and combines of one micro-batch"
    )
    alt = "Bars of the busiest links and the sorted busy times of all links. " + _link_title(evaluations, names) + "."
    note = "Forward and backward of all MoE layers, mean traffic of the trace. An exchange lasts as long as its busiest link."
    return Panel(_link_title(evaluations, names), alt, svg, table, note)


def _link_title(evaluations: Sequence[Evaluation], names: Sequence[str]) -> str:
    first, last = evaluations[0].link_us, evaluations[-1].link_us
    if not first.any():
        return "No link carries anything"
    text = f"The busiest link, {names[int(first.argmax())]}, works {format_us(first.max())} per micro-batch"
    if first is last:
        return text
    return f"{text}; with {evaluations[-1].name} the busiest, {names[int(last.argmax())]}, works {format_us(last.max())}"


def _sorted_curve(time_us: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(percent of the links, busy time in us), not more than a line can show."""
    ordered = -np.sort(-time_us)
    index = np.unique(np.linspace(0, ordered.size - 1, min(ordered.size, _CURVE_POINTS)).round().astype(int))
    return 100 * index / max(ordered.size - 1, 1), ordered[index]
