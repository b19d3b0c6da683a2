"""The picture of a routing trace: which experts are loaded in which layer, and how uneven that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.summary import summarize
from megatron_scalemoe.traffic.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_TOKENS = "#e4e4e4"
# Loads below this fraction of the mean look alike; they hardly matter.
SMALLEST = 1 / 32


def trace_figure(trace: RoutingTrace) -> Figure:
    """Heat map (layer x expert) of the mean load, and the sorted loads. Raises `ScaleMoEError` when matplotlib is missing."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ScaleMoEError("figures need matplotlib", found=error, try_="pip install 'megatron-scalemoe[report]'") from error
    load_LE = trace.counts.sum(axis=(0, 2), dtype=np.float64)
    load_LE /= np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-9)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    heat, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    figure.suptitle(_finding(trace), fontsize=12)

    smallest = load_LE[load_LE > 0].min(initial=0.5)
    norm = LogNorm(max(smallest, SMALLEST), max(load_LE.max(), 2.0), clip=True)
    heat.set_facecolor(NO_TOKENS)
    image = heat.imshow(np.ma.masked_equal(load_LE, 0.0), aspect="auto", interpolation="nearest", norm=norm, cmap="cividis")
    heat.set(xlabel="expert", ylabel="layer")
    heat.set_title("mean load of each expert (grey: no tokens)", fontsize=10)
    for axis in (heat.xaxis, heat.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bar = figure.colorbar(image, ax=heat)
    _ratio_ticks(bar, norm.vmin, norm.vmax)
    bar.set_label("load / mean load of the layer")

    place = np.arange(1, load_LE.shape[1] + 1)
    ordered_LE = -np.sort(-load_LE, axis=1)
    for row_E in ordered_LE:
        curve.plot(place, row_E, color="0.75", linewidth=0.7)
    curve.plot(
        place, ordered_LE.mean(axis=0), color="#0072b2", linewidth=2, label="mean of the layers" if len(load_LE) > 1 else "the layer"
    )
    curve.axhline(1.0, color="#d55e00", linestyle="--", linewidth=1, label="perfect balance")
    curve.set(xlabel="experts, the most loaded first", ylabel="load / mean load", ylim=(0, None))
    curve.set_title("sorted loads" + (" (grey: each layer)" if len(load_LE) > 1 else ""), fontsize=10)
    curve.legend(frameon=False)
    return figure


def _finding(trace: RoutingTrace) -> str:
    summary = summarize(trace)
    total, experts = summary["total"], summary["experts"]
    text = f"The busiest of {experts} experts gets {total['max_over_mean_experts']:.1f}x the mean load"
    if experts > 5:
        text += f", five get {100 * total['top5_share']:.0f} % of all selections"
    dead = 100 * total["dead_experts"]
    return text + (f", {dead:.0f} % get none" if dead >= 0.5 else "")


def _ratio_ticks(bar, smallest: float, largest: float) -> None:
    ticks = [t for t in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16, 32, 64, 128, 256) if smallest <= t <= largest]
    bar.set_ticks(ticks, labels=[f"1/{round(1 / t)}" if t < 1 else f"{t:.0f}" for t in ticks])
    bar.ax.minorticks_off()
