"""What lies in a run's directory: topologies, traces, plans, results (told apart by what is in them, not by their names), training runs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes, read_document
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan
from megatron_scalemoe.report.results import RESULTS, Result, kind_of_result, read_result
from megatron_scalemoe.report.training_runs import CONFIG_FILE, HISTORY_FILE, TrainingRun, is_run_folder, read_training_run
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.topology_file import load_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace

_DOCUMENTS = (".json", ".yaml", ".yml")
_NPZ = b"PK\x03\x04"
_TOPOLOGY_YAML = re.compile(r"^(builder|vertices)\s*:", re.MULTILINE)
WANTED = (
    "a topology (scalemoe topology build), a trace (scalemoe trace synth, convert), plans (scalemoe plan -o), and what "
    "`scalemoe compare`, `simulate`, `plan` or `bench` --json printed; all directly in that directory; and the folders of training runs "
    f"({CONFIG_FILE} and {HISTORY_FILE}) in it"
)


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
    results: dict[str, list[Result]] = dataclasses.field(default_factory=lambda: {kind: [] for kind in RESULTS})
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
    # Not Path.resolve: it raises on links that lead in a circle.
    skipped = os.path.realpath(ignore) if ignore else None
    run = Run(directory=printable(os.path.basename(os.path.realpath(directory))))
    of_training = is_run_folder(directory)
    if of_training:
        _add_training(run, directory, run.directory, "")
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or os.path.realpath(path) == skipped:
            continue
        if not path.exists():
            run.damaged.append((printable(path.name), f"{printable(path.name)}: a link to nothing, or in a circle"))
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
    except Exception as error:
        run.damaged.append((name, _told(error, name)))
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
    except Exception as error:
        run.damaged.append((name, _told(error, name)))


def _told(error: Exception, name: str) -> str:
    """A file may hold anything: what no reader foresaw must not cost the page."""
    return printable(str(error) if isinstance(error, ScaleMoEError) else f"{name}: cannot be read: {type(error).__name__}: {error}")


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
    kind = kind_of_result(document.data)
    if kind is not None:
        run.results[kind].append(read_result(document, kind, name))
    return kind
