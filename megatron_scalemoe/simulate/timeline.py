"""A simulated step as a Chrome trace (JSON), for Perfetto (ui.perfetto.dev) or chrome://tracing: a process per node, a track per rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_scalemoe.files import write_atomically
from megatron_scalemoe.simulate.engine import Replay

# About 20 MB of JSON, which Perfetto opens in seconds; a step that needs more is cut after the layers that fit.
MAX_EVENTS = 200_000
# Of each part's time of forward and backward together, see `CostModel`.
_EXCHANGE_FORWARD = 1 / 2
_COMPUTE_FORWARD = 1 / 3


def timeline_events(replay: Replay, node_of_rank_G: np.ndarray, step: int, *, max_events: int = MAX_EVENTS) -> list[dict]:
    """Chrome trace events of one step, in microseconds: forward through the layers, then backward.

    Per rank and layer: dispatch, compute, wait (for the most loaded rank), combine; in the backward half combine's gradient comes first.
    Replica transfers are the step's last event. What overlap hides is cut from the shorter of communication and compute, so that the
    timeline ends when the step does. Only the first layers are drawn if all would make more than `max_events`; see `drawn_layers`.
    """
    ranks, layers = replay.load.shape[2], drawn_layers(replay, max_events)
    forward, backward = range(layers), range(layers - 1, -1, -1)
    events = _names(node_of_rank_G, step)
    start_us = 0.0
    for is_forward, order in ((True, forward), (False, backward)):
        for layer in order:
            for name, begin_us, duration_us_G in _layer_parts(replay, step, layer, is_forward):
                events += _events(f"{name} {layer}", start_us + begin_us, duration_us_G, node_of_rank_G, name, is_forward)
            start_us += _parts_us(replay, step, layer, is_forward).sum()
    replica_us = float(replay.replica_us[step, :layers].sum())
    return events + _events("replicas", np.full(ranks, start_us), np.full(ranks, replica_us), node_of_rank_G, "replicas", False)


def drawn_layers(replay: Replay, max_events: int = MAX_EVENTS) -> int:
    """How many layers of a step `timeline_events` draws."""
    _, layers, ranks = replay.load.shape
    return max(1, min(layers, max_events // (8 * ranks)))


def write_timeline(replay: Replay, node_of_rank_G: np.ndarray, step: int, path: Path, *, force: bool = False) -> None:
    """Writes the Chrome trace of one step, one event a line, atomically."""
    events = ",\n".join(json.dumps(event, separators=(",", ":")) for event in timeline_events(replay, node_of_rank_G, step))
    write_atomically(path, f'{{"displayTimeUnit":"ms","traceEvents":[\n{events}\n]}}\n', force=force)


def _parts_us(replay: Replay, step: int, layer: int, is_forward: bool) -> np.ndarray:
    """float64 [3]: exposed time of dispatch, of the most loaded rank's compute, and of combine, in one direction."""
    dispatch_us, compute_us, combine_us = (float(getattr(replay, f"{n}_us")[step, layer]) for n in ("dispatch", "compute", "combine"))
    communication_us = dispatch_us + combine_us
    hidden_us = communication_us + compute_us + float(replay.replica_us[step, layer]) - float(replay.total_us[step, layer])
    keep_communication = keep_compute = 1.0
    if communication_us < compute_us:
        keep_communication -= hidden_us / communication_us if communication_us else 0.0
    else:
        keep_compute -= hidden_us / compute_us if compute_us else 0.0
    exchange = _EXCHANGE_FORWARD if is_forward else 1 - _EXCHANGE_FORWARD
    compute = _COMPUTE_FORWARD if is_forward else 1 - _COMPUTE_FORWARD
    parts = (dispatch_us * exchange * keep_communication, compute_us * compute * keep_compute, combine_us * exchange * keep_communication)
    return np.maximum(parts, 0.0)


def _layer_parts(replay: Replay, step: int, layer: int, is_forward: bool) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(name, start from the layer's start [G], duration [G]) of each part, in order."""
    dispatch_us, compute_us, combine_us = _parts_us(replay, step, layer, is_forward)
    load_G = replay.load[step, layer]
    own_us_G = compute_us * load_G / max(load_G.max(), 1.0)
    first, last = ("dispatch", "combine") if is_forward else ("combine", "dispatch")
    first_us, last_us = (dispatch_us, combine_us) if is_forward else (combine_us, dispatch_us)
    ones_G = np.ones_like(load_G)
    return [
        (first, 0 * ones_G, first_us * ones_G),
        ("compute", first_us * ones_G, own_us_G),
        ("wait", first_us + own_us_G, compute_us - own_us_G),
        (last, (first_us + compute_us) * ones_G, last_us * ones_G),
    ]


def _events(
    name: str, begin_us_G: np.ndarray, duration_us_G: np.ndarray, node_of_rank_G: np.ndarray, part: str, is_forward: bool
) -> list[dict]:
    """Complete ("X") events of the ranks where it takes any time."""
    category = f"{part},{'forward' if is_forward else 'backward'}"
    return [
        {
            "name": name,
            "cat": category,
            "ph": "X",
            "pid": int(node_of_rank_G[rank]),
            "tid": int(rank),
            "ts": round(float(begin_us_G[rank]), 3),
            "dur": round(float(duration_us_G[rank]), 3),
        }
        for rank in np.flatnonzero(duration_us_G >= 5e-4)
    ]


def _names(node_of_rank_G: np.ndarray, step: int) -> list[dict]:
    nodes = [
        {"name": "process_name", "ph": "M", "pid": int(node), "args": {"name": f"node {node} (recorded step {step})"}}
        for node in np.unique(node_of_rank_G)
    ]
    ranks = [
        {"name": "thread_name", "ph": "M", "pid": int(node), "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank, node in enumerate(node_of_rank_G)
    ]
    return nodes + ranks
