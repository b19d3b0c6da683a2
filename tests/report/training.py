"""Folders of small training runs, as `examples/gpt_moe/pretrain_gpt.py` leaves them."""

from pathlib import Path

from tests.report.small_run import write_json

ENV = {"cpu": "Some CPU", "cores": 2, "system": "Linux x86_64", "torch": "2.13.0", "megatron_core": "0.16.1", "numpy": "2"}
LOSSES = [4.0, 3.0, 2.5, 2.0]


def config(**options: object) -> dict:
    args = {"moe_dispatcher": "scalemoe", "moe_token_dispatcher_type": "alltoall", "lr": 0.1, "seed": 1, "expert_model_parallel_size": 2}
    return {"schema_version": 1, "args": args | options, "env": ENV}


def history(losses: list[float], *, step: int = 10, tokens_per_s: list | None = None, load: list | float | None = 1.5) -> list[dict]:
    """A report every `step` iterations, and a validation at the end."""
    speeds = tokens_per_s or [1000.0] * len(losses)
    records = [{"iteration": step * (i + 1), "lm_loss": l, "tokens_per_s": s} for i, (l, s) in enumerate(zip(losses, speeds, strict=True))]
    if load is not None:
        for record, value in zip(records, load if isinstance(load, list) else [load] * len(losses), strict=True):
            record["max_over_mean_load"] = value
    return [*records, {"iteration": step * len(losses), "validation_loss": 1.5}]


def interval(iteration: int, *, steps: int = 10, replica_ms: float = 3.0) -> dict:
    times = {"step_ms": 50.0, "replica_ms": replica_ms, "exposed_ms": 1.0}
    shares = {"local_share": 0.5, "uniform_share": 0.25}
    return {"event": "interval", "iteration": iteration, "steps": steps, **times, "max_over_mean": 1.2, "max_over_mean_p95": 1.4, **shares}


def replan(iteration: int, *, changed: bool, moved_homes: int = 0) -> dict:
    done = {"changed": changed, "moved_homes": moved_homes, "replicas_added": 4, "took_s": 0.02, "reason": "because"}
    return {"event": "replan", "iteration": iteration, **done}


def write_training(folder: Path, *, history: list | None = None, events: list | None = None, options: dict | None = None) -> Path:
    """A finished run; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(**(options or {})))
    write_json(folder / "train.json", {"schema_version": 1, "history": history or _history(), "events": events or []})
    return folder


def _history() -> list[dict]:
    return history(LOSSES)


def write_stages(directory: Path) -> Path:
    """Stock, the padded baseline, and a run with live balance that is fastest, most even and a little off in the loss."""
    directory.mkdir(exist_ok=True)
    stock = {"moe_dispatcher": "stock"}
    write_training(directory / "stock", options=stock, history=history(LOSSES, load=None))
    padded = history(LOSSES, tokens_per_s=[500.0] * 4, load=1.0)
    write_training(directory / "baseline", options={"scalemoe_dispatch": "padded"}, history=padded)
    write_training(directory / "adaptive", history=history(LOSSES, tokens_per_s=[1100.0] * 4))
    balanced = history([4.0, 3.0, 2.5 + 2e-6, 2.0 + 1e-6], tokens_per_s=[900.0, 1400.0, 1500.0, 1500.0], load=[1.5, 1.1, 1.1, 1.1])
    events = [interval(10), replan(12, changed=True, moved_homes=3), interval(40)]
    options = {"scalemoe_replicas": 8, "scalemoe_migrate": True, "scalemoe_sequence_placement": "affinity"}
    write_training(directory / "ga", options=options, history=balanced, events=events)
    return directory
