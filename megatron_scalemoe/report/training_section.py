"""The page's part about training runs: measured speed, loss and balance of runs of one model, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_scalemoe.report.figures.training import balance_panel, loss_finding, loss_panel, speed_finding, speed_panel
from megatron_scalemoe.report.page import Section, Tile
from megatron_scalemoe.report.tables_training import difference_text
from megatron_scalemoe.report.training_runs import (
    TrainingRun,
    compared,
    differing_options,
    fastest,
    hardware,
    loss_difference,
    rounding_run,
)

TRAINING = "training"


def training_section(runs: Sequence[TrainingRun]) -> Section | None:
    """Figures and the table; None without runs. runs: as `in_order` puts them."""
    if not runs:
        return None
    on = list(dict.fromkeys(hardware(run) for run in runs))
    ranks = "expert-parallel size " + ", ".join(sorted({str(run.options.get("expert_model_parallel_size", "?")) for run in runs}))
    lead = f"Measured, {ranks}, on {'; and on '.join(on)}. The first run, {runs[0].name}, is what the others are compared with."
    panels = [speed_panel(runs), loss_panel(runs), balance_panel(runs)]
    return Section(TRAINING, "Training runs", lead, [panel for panel in panels if panel is not None])


def training_warnings(runs: Sequence[TrainingRun]) -> list[str]:
    """What makes the runs' figures less comparable, or went wrong in them."""
    warnings = []
    for run in runs:
        if run is not rounding_run(runs) and (differing := differing_options(run, runs[0])):
            warnings.append(f"{run.name} and {runs[0].name} differ in {', '.join(differing)}: their losses and speeds do not compare.")
        if hardware(run) != hardware(runs[0]):
            warnings.append(f"{run.name} and {runs[0].name} were measured on different machines or software: their speeds do not compare.")
        if run.options.get("scalemoe_force_skew") is not None:
            warnings.append(f"{run.name} draws its experts (--scalemoe-force-skew): its loss means nothing.")
        if run.failures:
            more = f", and {len(run.failures) - 1} more like it" if len(run.failures) > 1 else ""
            warnings.append(f"{run.name}: {run.failures[0]}{more}")
    return warnings


def training_summary(runs: Sequence[TrainingRun]) -> tuple[str, list[Tile]]:
    """The page's first sentence, and the numbers below it."""
    first, again = runs[0], rounding_run(runs)
    others = compared(runs)
    best = fastest(others)
    tiles = [Tile("tokens/s, measured", f"{best.speed()[0]:,.0f}", f"{first.speed()[0]:,.0f} {first.name}")]
    loads = [(run, run.load()) for run in runs if run.load() is not None]
    if len(loads) > 1:
        (start, before), (even, after) = loads[0], min(loads, key=lambda pair: pair[1])
        tiles.append(Tile("max/mean rank load", f"{after:.2f}", f"of {even.name}; {before:.2f} {start.name}"))
    if len(others) > 1:
        farthest = max(others[1:], key=lambda run: loss_difference(run, first)[1].max(initial=0.0))
        rounding = "" if again is None else f"; {difference_text(again, first)} {again.name}, by rounding alone"
        tiles.append(Tile("largest loss difference", difference_text(farthest, first), f"{farthest.name} to {first.name}{rounding}"))
    return f"{speed_finding(runs)}. {loss_finding(runs)}.", tiles
