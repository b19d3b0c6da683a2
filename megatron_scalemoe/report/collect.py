"""What lies in a run's directory: topologies, traces, plans, results (told apart by what is in them, not by their names), training runs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import Document, read_bytes, read_document
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan
from megatron_scalemoe.report.training_runs import CONFIG_FILE, HISTORY_FILE, TrainingRun, is_run_folder, read_training_run
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.topology_file import load_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace

_DOCUMENTS = (".json", ".yaml", ".yml")
_NPZ = b"PK\x03\x04"
_TOPOLOGY_YAML = re.compile(r"^(builder|vertices)\s*:", re.MULTILINE)
_TIMES = ("dispatch_us", "combine_us", "compute_us")
_MORE = ("replica_us", "max_over_mean_mean", "max_over_mean_p95", "bytes_scale_out", "wait_share", "migrated_bytes", "replans", "steps")
_SOLVED = ("lower_bound_us", "gap", "max_over_mean", "bytes_scale_out", "seconds")
# Kinds of results: the key that names a row, the numbers it must have, and those it may have.
_RESULTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "compare": ("policy", ("step_us", *_TIMES), (*_MORE, "cost_us", *_SOLVED)),
    "simulate": ("policy", ("step_us", *_TIMES), (*_MORE,)),
    "plan result": ("solver", ("cost_us",), _SOLVED),
    "bench dispatch": ("dispatcher", ("median_ms", "ratio_to_stock"), ("p90_ms", "ranks", "bytes_out", "max_rel_error")),
    "bench solvers": ("solver", ("cost_us", "seconds"), ("gap", "lower_bound_us", "seed")),
}
WANTED = (
    "a topology (scalemoe topology build), a trace (scalemoe trace synth, convert), plans (scalemoe plan -o), and what "
    "`scalemoe compare`, `simulate`, `plan` or `bench` --json printed; all directly in that directory; and the folders of training runs "
    f"({CONFIG_FILE} and {HISTORY_FILE}) in it"
)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One layer's search: (seconds, best cost_us so far) at each improvement, and what no placement can be below."""

    layer: int
    points: list[tuple[float, float]]
    lower_bound_us: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result file. `rows`: texts `name` (the file's) and the kind's naming key, else floats; absent keys are left out.

    curves: of a plan's result.
    """

    name: str
    rows: list[dict]
    curves: list[Curve] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class FileRow:
    """One file of the directory, for the page's list."""

    name: str
    kind: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """All that was read, each by its file's name, in the order of the names. `results`: by kind. `damaged`: (file or folder, error)."""

    directory: str
    topologies: dict[str, Topology] = dataclasses.field(default_factory=dict)
    traces: dict[str, RoutingTrace] = dataclasses.field(default_factory=dict)
    plans: dict[str, PlacementPlan] = dataclasses.field(default_factory=dict)
    results: dict[str, list[Result]] = dataclasses.field(default_factory=lambda: {kind: [] for kind in _RESULTS})
    trainings: list[TrainingRun] = dataclasses.field(default_factory=list)
    files: list[FileRow] = dataclasses.field(default_factory=list)
    unrecognised: list[str] = dataclasses.field(default_factory=list)
    damaged: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def collect(directory: Path, *, ignore: Path | None = None) -> Run:
    """Reads the files directly in `directory`, but hidden ones and `ignore` (the report itself); of its folders those of training runs.

    `directory` may be the folder of a training run itself.

    Damaged and unrecognised files are listed in the `Run`. Raises `ScaleMoEError` when there is no directory, or nothing of ours in it.
    """
    if not directory.is_dir():
        raise ScaleMoEError(f"{directory} must be a directory with the files of a run", found="no such directory", try_=WANTED)
    skipped = ignore.resolve() if ignore else None
    run = Run(directory=printable(directory.resolve().name))
    of_training = is_run_folder(directory)
    if of_training:
        _add_training(run, directory, run.directory, "")
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.resolve() == skipped:
            continue
        if path.is_dir():
            if is_run_folder(path):
                name = printable(path.name)
                _add_training(run, path, name, f"{name}/")
        elif path.is_file() and not (of_training and path.name in (CONFIG_FILE, HISTORY_FILE)):
            _add(run, path)
    if not run.files and not run.damaged:
        found = f"nothing of it among {len(run.unrecognised)} files" if run.unrecognised else "no files"
        raise ScaleMoEError(f"{directory} holds nothing to report", found=found, try_=WANTED)
    return run


def printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8: names on disk are bytes, and need not be."""
    return name.encode("utf-8", "replace").decode("utf-8")


def _add_training(run: Run, folder: Path, name: str, prefix: str) -> None:
    """A training run; its files get `prefix` before their names."""
    try:
        training = read_training_run(folder, name)
        rows = [_file_row(folder / file, f"{prefix}{file}", "training run") for file in (CONFIG_FILE, HISTORY_FILE)]
    except ScaleMoEError as error:
        run.damaged.append((name, printable(str(error))))
        return
    run.trainings.append(training)
    run.files.extend(rows)


def _add(run: Run, path: Path) -> None:
    name = printable(path.name)
    try:
        kind = _read(run, path, name)
        if kind is None:
            run.unrecognised.append(name)
            return
        run.files.append(_file_row(path, name, kind))
    except ScaleMoEError as error:
        run.damaged.append((name, printable(str(error))))


def _file_row(path: Path, name: str, kind: str) -> FileRow:
    content = read_bytes(path)
    return FileRow(name, kind, len(content), hashlib.sha256(content).hexdigest())


def _read(run: Run, path: Path, name: str) -> str | None:
    """Adds the file's content to the run and tells its kind; None if it is nothing of ours."""
    if path.suffix not in _DOCUMENTS:
        if path.suffix != ".npz" and read_bytes(path)[: len(_NPZ)] != _NPZ:
            return None
        run.traces[name] = load_trace(path)
        return "trace"
    # YAML takes long to parse, and only topologies are YAML.
    if path.suffix != ".json":
        if not _TOPOLOGY_YAML.search(read_bytes(path).decode("utf-8", "replace")):
            return None
        run.topologies[name] = load_topology(path)
        return "topology"
    document = read_document(path)
    if "builder" in document.data or "vertices" in document.data:
        run.topologies[name] = load_topology(path)
        return "topology"
    if "physical_to_logical" in document.data:
        run.plans[name] = load_plan(path)
        return "plan"
    if "traceEvents" in document.data:
        return "timeline"
    kind = _kind_of_result(document.data)
    if kind is not None:
        run.results[kind].append(_result(document, kind, name))
    return kind


def _kind_of_result(data: dict) -> str | None:
    rows = data.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        first = rows[0]
        if "policy" in first:
            return "compare"
        if "dispatcher" in first and "median_ms" in first:
            return "bench dispatch"
        return "bench solvers" if "solver" in first and "seconds" in first else None
    if "step_us" in data:
        return "simulate"
    return "plan result" if "solver" in data and "cost_us" in data else None


def _result(document: Document, kind: str, name: str) -> Result:
    key, needed, optional = _RESULTS[kind]
    rows = []
    for field in _row_fields(document, kind):
        values = document.get(field, dict) if field else document.data
        # A file of one row may leave out what to call it.
        row = {key: document.get((*field, key), str) if field or key in values else name}
        row |= {number: document.get((*field, number), float) for number in needed}
        row |= {number: document.get((*field, number), float) for number in optional if values.get(number) is not None}
        if negative := next((number for number, value in row.items() if isinstance(value, float) and value < 0 and number != "gap"), None):
            raise document.error((*field, negative), "must be 0 or more", found=row[negative])
        rows.append({"name": name, **row})
    return Result(name, rows, _curves(document) if kind == "plan result" else [])


def _row_fields(document: Document, kind: str) -> list[tuple]:
    if "rows" in document.data:
        return [("rows", index) for index in range(len(document.get(("rows",), list)))]
    baseline = document.data.get("baseline") if kind == "simulate" else None
    if isinstance(baseline, dict) and baseline.get("policy") != document.data.get("policy"):
        return [("baseline",), ()]
    return [()]


def _curves(document: Document) -> list[Curve]:
    """The search of each layer of a plan's result, where it was recorded."""
    layers = document.get(("layers",), list, default=[])
    curves = []
    for layer in range(len(layers)):
        if "history" not in document.get(("layers", layer), dict):
            continue
        points = []
        for index in range(len(document.get(("layers", layer, "history"), list))):
            at = ("layers", layer, "history", index)
            if len(document.get(at, list)) != 2:
                raise document.error(at, "must be [seconds, cost_us]", found=layers[layer]["history"][index])
            points.append((document.get((*at, 0), float), document.get((*at, 1), float)))
        bound_us = document.get(("layers", layer, "lower_bound_us"), float, default=0.0)
        if points:
            curves.append(Curve(layer, points, bound_us if bound_us > 0 else None))
    return curves
