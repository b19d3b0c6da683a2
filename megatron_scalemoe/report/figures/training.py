"""Figures of training runs of one model: how fast they are, that the loss stays the same, and how even the load of the ranks is."""

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
    bar_axes,
    drawing,
    format_ratio,
    label,
    to_svg,
)
from megatron_scalemoe.report.tables_training import balance_table, loss_table, runs_table
from megatron_scalemoe.report.training_runs import TrainingRun, compared, fastest, loss_difference, rounding_run

_COLORS = (ORANGE, PURPLE, GREEN, SKY, BLUE, VERMILION, GREY)
_LINES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (4, 2)), ":")
_MAX_RUNS = 12


def speed_panel(runs: Sequence[TrainingRun]) -> Panel:
    """Bars of tokens/s, baselines first, and the table of all runs. runs: as `in_order` puts them; the first is the reference."""
    shown, best = compared(runs)[:_MAX_RUNS], fastest(compared(runs))
    speeds = [run.speed() for run in shown]
    median, low, high, mean = map(np.array, zip(*speeds, strict=True))
    with drawing(10.4, 1.2 + 0.46 * len(shown)) as figure:
        axis = figure.subplots()
        at = np.arange(len(shown))
        colors = [BASELINE_COLOR if run.is_baseline or run is runs[0] else PLAN_COLOR if run is best else GREY for run in shown]
        axis.barh(at, median, height=0.68, color=colors)
        axis.errorbar(
            median, at, xerr=[median - low, high - median], fmt="none", ecolor=VERMILION, capsize=3, label="10th to 90th percentile"
        )
        axis.plot(mean, at, linestyle="none", marker="D", markersize=5, color=PURPLE, label="mean, pauses included")
        texts = [f"{m:,.0f}" + (f", {format_ratio(m / median[0])}x" if i else "") for i, m in enumerate(median)]
        xlabel = "tokens/s: median of the reports of the second half"
        bar_axes(axis, [run.name for run in shown], xlabel, list(np.maximum(high, mean)), texts)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside upper left", ncols=2, borderaxespad=0)
        svg = to_svg(figure, "training-speed")
    note = "Speeds are medians over the reports of each run's second half; the mean counts every pause, replans and moves of experts too. "
    return Panel(
        speed_finding(runs),
        f"Bars of the speed of {len(shown)} runs. {speed_finding(runs)}.",
        svg,
        runs_table(runs),
        note + _left(runs),
        True,
    )


def speed_finding(runs: Sequence[TrainingRun]) -> str:
    """The fastest run beside each baseline."""
    runs = compared(runs)
    best, others = fastest(runs), [run for run in runs if run.is_baseline or run is runs[0]]
    text = f"{best.name} trains {best.speed()[0]:,.0f} tokens/s"
    beside = [f"{format_ratio(best.speed()[0] / run.speed()[0])}x {run.name}" for run in others if run is not best]
    if best is runs[0] and len(runs) > 1:
        return f"No run is faster than {best.name}, {best.speed()[0]:,.0f} tokens/s"
    return f"{text}, {' and '.join(beside)}" if beside else text


def loss_panel(runs: Sequence[TrainingRun]) -> Panel:
    """The loss of all runs, and how far each is from the first one's at equal iterations."""
    shown, reference = runs[:_MAX_RUNS], runs[0]
    differences = [loss_difference(run, reference) for run in shown[1:]]
    visible = [difference[difference > 0] for _, difference in differences]
    with drawing(10.4, 3.9) as figure:
        axes = figure.subplots(1, 2 if differences else 1, squeeze=False)[0]
        for index, run in enumerate(shown):
            # All curves lie on each other when the loss is the same: the first one broad, the others in dashes upon it.
            style = {"linewidth": 1.6, "linestyle": _LINES[index % len(_LINES)]} if index else {"linewidth": 5, "alpha": 0.45}
            axes[0].plot(run.iteration_N, run.lm_loss_N, color=_color(index), label=label(run.name), **style)
        axes[0].set(xlabel="iteration", ylabel="lm loss", title="loss")
        for index, (iterations, difference) in enumerate(differences, 1):
            shown_at = difference > 0
            axes[1].plot(iterations[shown_at], difference[shown_at], color=_color(index), linewidth=1.4, marker=".", markersize=4)
        if differences:
            axes[1].set(xlabel="iteration", title=f"difference to {label(reference.name)}", xlim=axes[0].get_xlim())
            if any(part.size for part in visible):
                axes[1].set_yscale("log")
                axes[1].yaxis.set_major_formatter("{x:.0e}")
                axes[1].yaxis.set_minor_formatter("")
            else:
                common = any(iterations.size for iterations, _ in differences)
                text = "none: equal to the last bit" if common else "no iteration in common"
                axes[1].text(0.5, 0.5, text, ha="center", transform=axes[1].transAxes)
        for axis in axes:
            axis.grid()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6, borderaxespad=0)
        svg = to_svg(figure, "training-loss")
    note = "Sums in another order differ in the last bit; a token between two nearly equal experts may then go to the other, which shows "
    note += "as a jump, and training makes the difference grow. "
    if (again := rounding_run(runs)) is not None:
        note += f"{again.name} is {reference.name} again, with each batch summed in other parts: how far that alone takes the loss. "
    if any(part.size for part in visible):
        note += "Points without a difference are not drawn. "
    return Panel(
        loss_finding(runs), f"Loss curves of {len(shown)} runs. {loss_finding(runs)}.", svg, loss_table(runs), note + _left(runs), True
    )


def loss_finding(runs: Sequence[TrainingRun]) -> str:
    """How far the losses are apart."""
    reference = runs[0]
    if len(runs) == 1:
        return f"{reference.name} ends at loss {reference.lm_loss_N[-1]:.4f} after {reference.iteration_N[-1]} iterations"
    differences = {run.name: loss_difference(run, reference)[1] for run in runs[1:]}
    largest = {name: float(difference.max()) for name, difference in differences.items() if difference.size}
    if not largest:
        return f"No other run reports the loss at an iteration of {reference.name}: nothing to compare"
    again = rounding_run(runs)
    again = again if again is not None and again.name in largest else None
    own = largest.pop(again.name) if again is not None else 0.0
    if not largest:
        return f"{reference.name} and {again.name} are {own:.1e} apart at most: rounding"
    name = max(largest, key=largest.__getitem__)
    if not largest[name] and len(largest) + (again is not None) < len(differences):
        return f"Where they report the same iterations, losses are the same as {reference.name}'s to the last bit"
    if not largest[name]:
        return f"All losses are the same as {reference.name}'s to the last bit"
    text = f"At equal iterations no loss is more than {largest[name]:.1e} from {reference.name}'s (the farthest: {name})"
    return f"{text}; rounding alone takes {again.name} {own:.1e} away" if again is not None else text


def balance_panel(runs: Sequence[TrainingRun]) -> Panel | None:
    """max/mean load of the ranks over the iterations, with a mark where a new plan came into force. None if no run has recorded it."""
    shown = [run for run in runs if run.load() is not None][:_MAX_RUNS]
    if not shown:
        return None
    with drawing(10.4, 3.9) as figure:
        axis = figure.subplots()
        for run in shown:
            index = list(runs).index(run)
            axis.plot(
                run.iteration_N,
                run.load_N,
                color=_color(index),
                linewidth=1.8,
                linestyle=_LINES[index % len(_LINES)],
                label=label(run.name),
            )
        for run in shown:
            at = np.array([replan.iteration for replan in run.new_plans])
            if at.size:
                load = np.interp(at, run.iteration_N, run.load_N)
                axis.plot(
                    at,
                    load,
                    linestyle="none",
                    marker="v",
                    markersize=8,
                    color=_color(list(runs).index(run)),
                    label=f"{label(run.name)}: new plan",
                )
        axis.axhline(1, color=GREEN, linewidth=1)
        axis.grid()
        axis.set(xlabel="iteration", ylabel="load of the busiest rank / mean")
        axis.set_ylim(bottom=min(0.98, axis.get_ylim()[0]))
        figure.legend(loc="outside upper left", ncols=5, borderaxespad=0)
        svg = to_svg(figure, "training-balance")
    title = _balance_finding(shown)
    note = "Rows that each rank's experts computed, mean over the MoE layers and the iterations of a report; 1 is perfect balance. "
    if padded := [run.name for run in runs if run.is_padded]:
        note += f"Not drawn: {', '.join(padded)}, where padding makes every rank compute as many rows as the busiest. "
    return Panel(title, f"Curves of the load's balance in {len(shown)} runs. {title}.", svg, balance_table(runs), note + _left(runs), True)


def _balance_finding(runs: Sequence[TrainingRun]) -> str:
    best = min(runs, key=lambda run: run.load())
    if best is runs[0]:
        return f"The busiest rank computes {format_ratio(best.load())}x the mean in {best.name}" + (
            "; no other is more even" if len(runs) > 1 else ""
        )
    plans = len(best.new_plans)
    after = f", after {plans} new plan{'s' if plans > 1 else ''}" if plans else ""
    first = f"{format_ratio(runs[0].load())}x in {runs[0].name}"
    return f"The busiest rank computes {format_ratio(best.load())}x the mean in {best.name}{after}, {first}"


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _left(runs: Sequence[TrainingRun]) -> str:
    return f"The first {_MAX_RUNS} of {len(runs)} runs are drawn." if len(runs) > _MAX_RUNS else ""
