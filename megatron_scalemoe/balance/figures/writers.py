"""The figures of the MoE layers in Megatron's TensorBoard and W&B writers, and as a table for the terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_scalemoe.balance.figures.layers import LayerFigures
from megatron_scalemoe.balance.figures.log import event_text
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
