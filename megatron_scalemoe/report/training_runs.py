"""Training runs: what the scripts in `examples/` leave in a run's folder, and the figures that tell one run from another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, field_validator

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import Document, read_document
from megatron_scalemoe.typed import Facts, Number, SchemaVersion, check, refused

CONFIG_FILE, HISTORY_FILE = "config.json", "train.json"
# Options that may differ between runs of the same model on the same data; so may ours, whose names begin with scalemoe.
_FREE = {"config", "run_name", "results_dir", "save", "save_interval", "tensorboard_dir", "eval_interval", "eval_iters", "compare_iters"}
_FREE |= {"moe_dispatcher", "moe_token_dispatcher_type", "distributed_timeout_minutes"}
_HARDWARE = ("cpu", "gpu", "cores", "system", "torch", "megatron_core")


Count = Annotated[int, Field(ge=0, le=1 << 53)]


class Interval(Facts):
    """Live balance's figures of some steps up to `iteration`; times are means per step, of the slowest rank.

    local_share: of the selections, those computed on the rank of their token; uniform_share: what chance gives. None where not measured.
    """

    iteration: Count
    steps: Count
    replica_ms: Number
    exposed_ms: Number
    max_over_mean: Number
    max_over_mean_p95: Number
    local_share: Number | None = None
    uniform_share: Number | None = None


class ReplanEvent(Facts):
    """A plan that came into force, or one that was not worth it (`changed` False)."""

    iteration: Count
    changed: bool
    moved_homes: Count
    replicas_added: Count
    took_s: Number


class _Event(Facts):
    event: str
    iteration: Count | None = None
    reason: str | None = None


class _Record(Facts):
    """Of training steps, with a loss and a speed, or of a validation."""

    iteration: Count
    lm_loss: Number | None = None
    tokens_per_s: Annotated[Number, Field(gt=0)] | None = None
    max_over_mean_load: Number | None = None
    validation_loss: Number | None = None


class _Train(Facts):
    schema_version: SchemaVersion
    history: list[_Record]
    events: list[_Event] = Field(default_factory=list)


class _Options(Facts):
    """Of the run's options, those that say what was on."""

    moe_dispatcher: str
    moe_token_dispatcher_type: str | None = None
    scalemoe_dispatch: str | None = None
    scalemoe_replicas: Count | None = None
    scalemoe_sequence_placement: str | None = None
    scalemoe_migrate: bool | None = None
    scalemoe_plan: str | None = None
    scalemoe_config: str | None = None
    scalemoe_force_skew: Number | None = None


class _Config(Facts):
    """args: all options; those of `_Options` are checked."""

    schema_version: SchemaVersion
    args: dict[str, Any]
    env: dict[str, Any]

    @field_validator("args")
    @classmethod
    def _of_ours(cls, args: dict[str, Any]) -> dict[str, Any]:
        try:
            check(_Options, args)
        except ScaleMoEError as error:
            raise refused(error.problem, field=error.field, found=error.found) from error
        return args


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TrainingRun:
    """One run. N reported iterations, in order: iteration_N int64, each the last of the steps that it reports; means over these steps:
    lm_loss_N, tokens_per_s_N, load_N (max/mean load of the ranks; NaN where it was not recorded), all float64. With padding every rank
    computes as many rows as the busiest: no load is told then.

    failures: what live balance could not do, in words. env: of `describe_environment`.
    """

    name: str
    options: dict
    env: dict
    iteration_N: np.ndarray
    lm_loss_N: np.ndarray
    tokens_per_s_N: np.ndarray
    load_N: np.ndarray
    validation: list[tuple[int, float]]
    intervals: list[Interval]
    replans: list[ReplanEvent]
    failures: list[str]

    @property
    def is_baseline(self) -> bool:
        """Whether this is stock Megatron, or the padded exchange of Tutel's kind."""
        return self.is_stock or self.is_padded

    @property
    def is_padded(self) -> bool:
        return self.options.get("scalemoe_dispatch") == "padded"

    @property
    def is_stock(self) -> bool:
        return self.options["moe_dispatcher"] == "stock"

    @property
    def techniques(self) -> str:
        """What is on, in words."""
        o = self.options
        if self.is_stock:
            return f"stock {o.get('moe_token_dispatcher_type', '')}".strip()
        parts = [o.get("scalemoe_dispatch") or "ragged"]
        parts += [f"{o['scalemoe_replicas']} replicas"] if o.get("scalemoe_replicas") else []
        parts += ["sequences"] if o.get("scalemoe_sequence_placement") == "affinity" else []
        parts += ["migration"] if o.get("scalemoe_migrate") else []
        parts += [f"plan {Path(str(o['scalemoe_plan'])).name}"] if o.get("scalemoe_plan") else []
        parts += [f"options of {Path(str(o['scalemoe_config'])).name}"] if o.get("scalemoe_config") else []
        parts += [f"forced skew {o['scalemoe_force_skew']}"] if o.get("scalemoe_force_skew") is not None else []
        return " + ".join(parts)

    @property
    def second_half_N(self) -> np.ndarray:
        """bool [N]: the reports whose steps all lie in the second half, where caches are warm and plans in force; else the last one."""
        first_N = np.concatenate([[0], self.iteration_N[:-1]])
        late_N = first_N >= self.iteration_N[-1] / 2
        late_N[-1] = True
        return late_N

    def speed(self) -> tuple[float, float, float, float]:
        """tokens/s of the second half: median, 10th and 90th percentile of the reports, and the mean, with every pause in it."""
        late_N = self.second_half_N
        tokens_per_s = self.tokens_per_s_N[late_N]
        steps = np.diff(self.iteration_N, prepend=0)[late_N]
        low, median, high = np.percentile(tokens_per_s, (10, 50, 90))
        return float(median), float(low), float(high), float(steps.sum() / (steps / tokens_per_s).sum())

    def load(self) -> float | None:
        """max/mean load of the ranks, mean of the second half; None when it was not recorded."""
        load = self.load_N[self.second_half_N]
        return None if np.isnan(load).all() else float(np.nanmean(load))

    def late_intervals(self) -> list[Interval]:
        """Those that end in the second half."""
        return [interval for interval in self.intervals if interval.iteration > self.iteration_N[-1] / 2]

    def mean_ms(self, field: str) -> float | None:
        """Mean of an `Interval`'s time over the second half; None without any."""
        intervals = self.late_intervals()
        steps = sum(interval.steps for interval in intervals)
        return sum(getattr(interval, field) * interval.steps for interval in intervals) / steps if steps else None

    def locality(self) -> tuple[float, float] | None:
        """(local share, what chance gives), mean of the second half; None if it was not measured."""
        shares = [(i.local_share, i.uniform_share) for i in self.late_intervals() if i.local_share is not None and i.uniform_share]
        return (float(np.mean([s for s, _ in shares])), float(np.mean([u for _, u in shares]))) if shares else None

    @property
    def new_plans(self) -> list[ReplanEvent]:
        return [replan for replan in self.replans if replan.changed]


def loss_difference(run: TrainingRun, reference: TrainingRun) -> tuple[np.ndarray, np.ndarray]:
    """(iterations, |loss - the reference's loss|) at the iterations that both report."""
    common, own, theirs = np.intersect1d(run.iteration_N, reference.iteration_N, return_indices=True)
    return common, np.abs(run.lm_loss_N[own] - reference.lm_loss_N[theirs])


def in_order(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """Baselines first, stock Megatron before all; then the more that is on, the later."""

    def machinery(run: TrainingRun) -> tuple:
        o = run.options
        replicas = bool(o.get("scalemoe_replicas") or o.get("scalemoe_plan"))
        return not run.is_stock, not run.is_baseline, bool(o.get("scalemoe_migrate")), replicas, run.techniques.count("+"), run.name

    return sorted(runs, key=machinery)


def fastest(runs: Sequence[TrainingRun]) -> TrainingRun:
    """By the median; of equal ones the first."""
    return max(runs, key=lambda run: run.speed()[0])


def differing_options(run: TrainingRun, reference: TrainingRun) -> list[str]:
    """Options that make losses or speeds of the two incomparable."""
    names = (run.options.keys() | reference.options.keys()) - _FREE
    return sorted(n for n in names if not n.startswith("scalemoe") and run.options.get(n) != reference.options.get(n))


def rounding_run(runs: Sequence[TrainingRun]) -> TrainingRun | None:
    """Stock Megatron again, on the same batches in other micro-batches: how far rounding alone takes the loss. runs: as of `in_order`."""
    same = (run for run in runs[1:] if run.is_stock and runs[0].is_stock and differing_options(run, runs[0]) == ["micro_batch_size"])
    return next(same, None)


def compared(runs: Sequence[TrainingRun]) -> list[TrainingRun]:
    """All but the `rounding_run`: those whose speeds and losses say something about what is on."""
    return [run for run in runs if run is not rounding_run(runs)]


def hardware(run: TrainingRun) -> str:
    """What the run was measured on, as its config.json says."""
    known = {name: run.env[name] for name in _HARDWARE if run.env.get(name) is not None}
    machine = [str(known[name]) for name in ("gpu", "cpu") if name in known] + ([f"{known['cores']} cores"] if "cores" in known else [])
    software = [f"{name.replace('_', '-')} {known[name]}" for name in ("torch", "megatron_core") if name in known]
    return ", ".join([*machine, *([str(known["system"])] if "system" in known else []), *software]) or "unknown hardware"


def is_run_folder(folder: Path) -> bool:
    """Whether a training run has written here, finished or not."""
    if (folder / HISTORY_FILE).is_file():
        return True
    try:
        return (folder / CONFIG_FILE).is_file() and "args" in read_document(folder / CONFIG_FILE).data
    except ScaleMoEError:  # a config.json of somebody else
        return False


def read_training_run(folder: Path, name: str) -> TrainingRun:
    """Reads `config.json` and `train.json`. Raises `ScaleMoEError` naming file, line and field if they are damaged or unfinished."""
    if not (folder / HISTORY_FILE).is_file():
        problem = f"{folder}: the run has no {HISTORY_FILE}, which is written at its end"
        raise ScaleMoEError(problem, found=f"only {CONFIG_FILE}", try_="let it finish, start it again, or remove the folder")
    config = read_document(folder / CONFIG_FILE).parse(_Config)
    train = read_document(folder / HISTORY_FILE)
    history = train.parse(_Train).history
    reports = _reports(train, history)
    intervals, replans, failures = _events(train)
    run = TrainingRun(
        name=name,
        options=config.args,
        env=config.env,
        iteration_N=np.array([report.iteration for report in reports], dtype=np.int64),
        lm_loss_N=np.array([report.lm_loss for report in reports]),
        tokens_per_s_N=np.array([report.tokens_per_s for report in reports]),
        load_N=np.array([report.max_over_mean_load for report in reports], dtype=np.float64),
        validation=[(record.iteration, record.validation_loss) for record in history if record.validation_loss is not None],
        intervals=intervals,
        replans=replans,
        failures=failures,
    )
    return dataclasses.replace(run, load_N=np.full_like(run.load_N, np.nan), intervals=[]) if run.is_padded else run


def _reports(train: Document, history: list[_Record]) -> list[_Record]:
    """The records of training steps."""
    last, reports = 0, []
    for index, record in enumerate(history):
        if record.lm_loss is None:
            continue
        at = ("history", index)
        if record.tokens_per_s is None:
            raise train.error(at, "'tokens_per_s' is missing")
        if record.iteration <= last:
            raise train.error((*at, "iteration"), "iterations must begin at 1 or later and increase", found=record.iteration)
        last = record.iteration
        reports.append(record)
    if not reports:
        raise train.error(("history",), "reports no training step", try_="a run of at least one iteration")
    return reports


def _events(train: Document) -> tuple[list[Interval], list[ReplanEvent], list[str]]:
    intervals, replans, failures = [], [], []
    for index, values in enumerate(train.data.get("events", [])):
        try:
            event = check({"interval": Interval, "replan": ReplanEvent}.get(values["event"], _Event), values)
        except ScaleMoEError as error:
            field = ("events", index, *error.field)
            raise error.at(train.place(field), field) from error
        if isinstance(event, Interval):
            intervals.append(event)
        elif isinstance(event, ReplanEvent):
            replans.append(event)
        elif event.reason is not None:
            where = "" if event.iteration is None else f"at iteration {event.iteration}"
            failures.append(f"{event.event} {where}: {' '.join(event.reason.split())}")
    return intervals, replans, failures
