"""Live balance's events as log lines."""

from __future__ import annotations


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
    "plan not resumed": lambda event: f"the checkpoint's plan is not resumed: {event['reason']}",
    "no plan to resume": lambda _: "no plan was saved with the checkpoint: experts stay where they are",
    "migration failed": lambda event: f"no expert has moved, the old plan stays: {event['reason']}",
}
