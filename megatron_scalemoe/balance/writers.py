"""Where what was measured is written: live balance's events as log lines, Megatron's TensorBoard and W&B writers, the table of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_scalemoe.balance.metrics import LayerFigures
from megatron_scalemoe.units import format_bytes, format_table

_NAMES = [field.name for field in dataclasses.fields(LayerFigures) if field.name != "layer"]
_TOTALS = ("replicas", "homes_moved")
# What an event adds to the figures of the layers.
_EVENT_VALUES = ("took_s", "current_us", "planned_us", "step_ms", "replica_ms", "exposed_ms", "local_share", "moved_sequences")


def scalars(figures: Sequence[LayerFigures], *, per_layer: bool) -> dict[str, float]:
    """`scalemoe/<figure>`: mean over the layers, sum for counts, and the worst layer's balance. `max_over_mean` of every layer, and with
    `per_layer` all its figures, as `scalemoe/<figure>/layer_<number>`."""
    values: dict[str, float] = {}
    for name in _NAMES:
        known = {figure.layer: value for figure in figures if (value := getattr(figure, name)) is not None}
        if not known:
            continue
        values[f"scalemoe/{name}"] = sum(known.values()) / (1 if name in _TOTALS else len(known))
        if per_layer or name == "max_over_mean":
            values |= {f"scalemoe/{name}/layer_{layer}": value for layer, value in known.items()}
    values["scalemoe/max_over_mean_worst"] = max(figure.max_over_mean for figure in figures)
    return values


def write_figures(tensorboard: Any, wandb: Any, figures: Sequence[LayerFigures], iteration: int, *, per_layer: bool) -> None:
    """Write them under this iteration to the writers that are not None."""
    _write(tensorboard, wandb, scalars(figures, per_layer=per_layer), iteration)


def write_events(tensorboard: Any, wandb: Any, events: Iterable[Mapping[str, Any]], iteration: int) -> None:
    """Write what live balance did on this pipeline stage since the last call: its log lines as text, its figures as scalars.

    In TensorBoard under the event's iteration; in W&B, which takes no earlier ones, under this one.
    """
    for event in events:
        at = event.get("iteration", iteration)
        if tensorboard:
            tensorboard.add_text("scalemoe/events", event_text(event), at)
        name = event["event"].replace(" ", "_")
        known = {f"scalemoe/{name}/{key}": event[key] for key in _EVENT_VALUES if event.get(key) is not None}
        _write(tensorboard, None, known | {f"scalemoe/{name}": 1}, at)
        _write(None, wandb, known | {f"scalemoe/{name}": 1}, iteration)


def _write(tensorboard: Any, wandb: Any, values: Mapping[str, float], iteration: int) -> None:
    if tensorboard:
        for name, value in values.items():
            tensorboard.add_scalar(name, value, iteration)
    if wandb:
        wandb.log(dict(values), iteration)


def format_figures(figures: Sequence[LayerFigures], iteration: int) -> str:
    """The table of all layers that is printed every `--scalemoe-table-interval` iterations."""
    headers = ["layer", "max/mean", "sent per rank and step", "local share", "dropped", "replicas", "homes moved"]
    rows = [
        [
            figure.layer,
            f"{figure.max_over_mean:.3f}",
            "-" if figure.sent_bytes is None else format_bytes(figure.sent_bytes),
            _percent(figure.local_share),
            _percent(figure.drop_rate),
            figure.replicas,
            figure.homes_moved,
        ]
        for figure in figures
    ]
    return f" scalemoe: MoE layers until iteration {iteration}\n{format_table(headers, rows)}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def event_text(event: dict) -> str:
    """One line for each event of `LiveBalance.events`."""
    return f" scalemoe: {_TEXTS[event['event']](event)}"


def _interval(event: dict) -> str:
    return (
        f"iterations {event['iteration'] - event['steps'] + 1} to {event['iteration']}: rank load max/mean {event['max_over_mean']:.3f}"
        f" (p95 {event['max_over_mean_p95']:.3f}), step {event['step_ms']:.1f} ms, waiting for replicas {event['replica_ms']:.2f} ms,"
        f" for replanning {event['exposed_ms']:.2f} ms a step{_local_share(event)}"
    )


def _local_share(event: dict) -> str:
    if event.get("local_share") is None:
        return ""
    share, uniform = event["local_share"], event["uniform_share"]
    placing = ", sequences not placed yet"
    if "placing_ms" in event:
        expected = f"expected {event['default_share']:.3f} -> {event['placed_share']:.3f} in the last batch"
        placing = f", {expected} in {event['placing_ms']:.2f} ms{'' if event['pays'] else ': not worth it, sequences stay'}"
    return f"; local share {share:.3f}, {share / uniform:.2f} x uniform{placing}"


def _replan(event: dict) -> str:
    if not event["changed"]:
        return f"iteration {event['iteration']}: the plan stays: {event['reason']}"
    return (
        f"iteration {event['iteration']}: new plan: {event['moved_homes']} homes moved, {event['replicas_added']} replicas added,"
        f" {event['replicas_removed']} removed in {event['took_s'] * 1e3:.0f} ms; expected: max/mean"
        f" {event['max_over_mean_before']:.3f} -> {event['max_over_mean_after']:.3f}, MoE time of a step"
        f" {event['current_us'] / 1e3:.2f} -> {event['planned_us'] / 1e3:.2f} ms, of which replicas {event['replica_us'] / 1e3:.2f} ms;"
        f" {event['reason']}"
    )


_TEXTS = {
    "interval": _interval,
    "replan": _replan,
    "planner failed": lambda event: f"iteration {event['iteration']}: no new plan, the old one stays: {event['reason']}",
    "planner busy": lambda event: f"iteration {event['iteration']}: the planner still works on the question of {event['asked_at']}",
    "trace not written": lambda event: f"the recorded routing could not be written, training goes on: {event['reason']}",
    "plan not resumed": lambda event: f"the checkpoint's plan is not resumed: {event['reason']}",
    "no plan to resume": lambda _: "no plan was saved with the checkpoint: experts stay where they are",
    "migration failed": lambda event: f"no expert has moved, the old plan stays: {event['reason']}",
}
