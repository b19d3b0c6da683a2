"""Tables of training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_scalemoe.report.figures.common import Table, format_ratio
from megatron_scalemoe.report.training_runs import TrainingRun, loss_difference

_NONE = "–"


def runs_table(runs: Sequence[TrainingRun]) -> Table:
    """All figures of all runs."""
    headers = ["run", "tokens/s", "speed", "mean", "final loss", "loss difference", "max/mean load"]
    headers += ["replicas, ms", "replanning, ms", "new plans", "moves", "what is on"]
    reference = runs[0].speed()[0]
    rows = []
    for run in runs:
        median, _, _, mean = run.speed()
        load, replica_ms, exposed_ms = run.load(), run.mean_ms("replica_ms"), run.mean_ms("exposed_ms")
        rows.append(
            [
                run.name,
                f"{median:,.0f}",
                f"{format_ratio(median / reference)}x",
                f"{mean:,.0f}",
                f"{run.lm_loss_N[-1]:.6f}",
                _NONE if run is runs[0] else difference_text(run, runs[0]),
                _NONE if load is None else f"{load:.3f}",
                _NONE if replica_ms is None else f"{replica_ms:.1f}",
                _NONE if exposed_ms is None else f"{exposed_ms:.1f}",
                f"{len(run.new_plans)} of {len(run.replans)}" if run.replans else "0",
                str(sum(replan.moved_homes for replan in run.new_plans)),
                run.techniques,
            ]
        )
    caption = f"Training runs. Speed, load and times per step: of the second half. Loss difference: the largest to {runs[0].name} at equal "
    caption += "iterations. Mean: tokens/s with all pauses. Moves: of homes of experts"
    return Table(headers, rows, caption)


def loss_table(runs: Sequence[TrainingRun]) -> Table:
    """Losses, and how far they are from the first run's."""
    headers = ["run", "iterations", "first loss", "final loss", "validation loss", "largest difference", "at iteration", "final difference"]
    rows = []
    for run in runs:
        iterations, difference = loss_difference(run, runs[0])
        apart = (
            [difference_text(run, runs[0]), str(iterations[difference.argmax()]), f"{difference[-1]:.1e}"]
            if difference.size
            else [_NONE] * 3
        )
        rows.append(
            [
                run.name,
                f"{run.iteration_N[-1]:,}",
                f"{run.lm_loss_N[0]:.6f}",
                f"{run.lm_loss_N[-1]:.6f}",
                f"{run.validation[-1][1]:.6f}" if run.validation else _NONE,
                *([_NONE] * 3 if run is runs[0] else apart),
            ]
        )
    return Table(headers, rows, f"Losses, and how far they are from those of {runs[0].name} at equal iterations")


def balance_table(runs: Sequence[TrainingRun]) -> Table:
    """Balance of the ranks, and what was changed for it."""
    headers = ["run", "max/mean, first report", "second half", "per step, mean", "per step, p95"]
    headers += ["new plans", "replicas added", "homes moved", "longest change, ms", "local share"]
    rows = []
    for run in runs:
        per_step: list[Callable] = [lambda i: i.max_over_mean, lambda i: i.max_over_mean_p95]
        intervals, plans, load = run.late_intervals(), run.new_plans, run.load()
        locality = run.locality()
        first = run.load_N[~np.isnan(run.load_N)][:1]
        rows.append(
            [
                run.name,
                f"{first[0]:.3f}" if first.size else _NONE,
                _NONE if load is None else f"{load:.3f}",
                *(f"{np.mean([of(i) for i in intervals]):.3f}" if intervals else _NONE for of in per_step),
                str(len(plans)),
                str(sum(plan.replicas_added for plan in plans)),
                str(sum(plan.moved_homes for plan in plans)),
                f"{1e3 * max(plan.took_s for plan in plans):.0f}" if plans else _NONE,
                "{:.1%}, by chance {:.1%}".format(*locality) if locality else _NONE,
            ]
        )
    return Table(headers, rows, "Balance of the ranks' load: largest / mean; per step: each single step's, of the second half")


def difference_text(run: TrainingRun, reference: TrainingRun) -> str:
    """The largest difference of the loss at equal iterations."""
    _, difference = loss_difference(run, reference)
    return f"{difference.max():.1e}" if difference.any() else "0" if difference.size else "no equal iterations"
