"""Reading a job's file: every value with where it comes from, unknown names and wrong types refused with the line they are in.

schema_version: 1
program: megatron_lm            # or gpt_moe, bert_moe: the examples
base: paper_gpt_64.yaml         # this file's values first; those below win
model: {num_layers: 12, ...}    # sections and options: job/options.py
extra_flags: [--log-throughput] # as they are, for flags that no section has
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import Document, read_document
from megatron_scalemoe.job.options import COUNT, DEFAULTS, PROGRAMS, REQUIRED, SECTIONS, Kind, fits, flag_of, kind_text

_TOP = ("schema_version", "program", "base", "extra_flags", *SECTIONS)
_MAX_BASES = 8
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Value:
    """A value and where it comes from.

    origin: `file`, `default` or `derived`. place: file and line, or what it is derived from.
    """

    value: Any
    origin: str
    place: str = ""

    @property
    def source(self) -> str:
        """For people: `job.yaml:12`, `default`, `derived: from seq_length`."""
        return self.place if self.origin == "file" else self.origin + (f": {self.place}" if self.place else "")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """A job: its file, what trains, all options by section and name, and flags that are passed on as they are."""

    path: Path
    program: str
    values: Mapping[Key, Value]
    extra_flags: Value

    def get(self, section: str, option: str, default: Any = None) -> Any:
        """The option's value, or `default` if it has none."""
        found = self.values.get((section, option))
        return default if found is None else found.value

    def error(self, key: Key, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about one option: says where it was set."""
        value = self.values.get(key)
        place = value.place if value is not None and value.origin == "file" else str(self.path)
        return ScaleMoEError(f"{place}: {'.'.join(key)}: {problem}", found=found, try_=try_)


def load_job(path: Path) -> JobConfig:
    """The job in the file, with defaults and what follows from other values; not yet checked for contradictions (`checks.check_job`).

    Raises `ScaleMoEError`, naming file and line, for unknown names, wrong types and missing options.
    """
    values: dict[Key, Value] = {}
    top: dict[str, Value] = {}
    for document in reversed(_with_bases(path)):
        top |= _read_top(document)
        values |= _read_sections(document)
    values = {key: value for key, value in values.items() if value.value is not None}
    if "program" not in top:
        raise ScaleMoEError(f"{path}: 'program' is missing", try_=f"program: {kind_text(tuple(PROGRAMS))}")
    if "scalemoe" in top:
        values.setdefault(("moe", "moe_dispatcher"), Value("scalemoe", "derived", "there is a scalemoe section"))
    job = JobConfig(path, top["program"].value, values, top.get("extra_flags", Value([], "default")))
    return _completed(job)


def _with_bases(path: Path) -> list[Document]:
    """The file, its base, the base's base, ..."""
    documents = [read_document(path)]
    while "base" in documents[-1].data:
        document = documents[-1]
        base = document.path.parent / document.get(("base",), str)
        if len(documents) > _MAX_BASES or any(base.resolve() == other.path.resolve() for other in documents):
            raise document.error(("base",), f"files must not be each other's base, nor more than {_MAX_BASES} deep", found=str(base))
        if not base.is_file():
            raise document.error(("base",), "names no file", found=str(base), try_="a path from this file's folder")
        documents.append(read_document(base))
    return documents


def _read_top(document: Document) -> dict[str, Value]:
    """What stands beside the sections, and `scalemoe` if there is such a section."""
    document.check_schema()
    for name in document.data:
        if name not in _TOP:
            raise document.error((name,), "unknown field", try_=_nearest(name, _TOP))
    top = {}
    for name, kind in (("program", tuple(PROGRAMS)), ("extra_flags", [str])):
        if name in document.data:
            top[name] = _read_value(document, (name,), document.data[name], kind)
    for word in top["extra_flags"].value if "extra_flags" in top else ():
        _check_extra_flag(document, word)
    if "scalemoe" in document.data:
        top["scalemoe"] = Value(True, "file", document.place(("scalemoe",)))
    return top


def _check_extra_flag(document: Document, word: str) -> None:
    """An option that a section has must stand there, where it is checked."""
    for section, options in SECTIONS.items():
        for option in options:
            if word.split("=")[0] == flag_of(section, option):
                raise document.error(("extra_flags",), f"{word} has a section", try_=f"{section}: {{{option}: ...}}")


def _read_sections(document: Document) -> dict[Key, Value]:
    values = {}
    for section, options in SECTIONS.items():
        if document.data.get(section) is None:
            continue
        for option, value in document.get((section,), dict).items():
            if option not in options:
                raise document.error((section, option), "unknown option", try_=_nearest_option(option, section))
            values[section, option] = _read_value(document, (section, option), value, options[option])
    return values


def _read_value(document: Document, field: tuple, value: object, kind: Kind) -> Value:
    if value is None or fits(value, kind):  # null takes back what a base says
        return Value(value, "file", document.place(field))
    try_ = None
    if isinstance(value, str) and kind in (int, float, COUNT):
        try_ = "a point: YAML reads 1e-4 as text, and 1.0e-4 as a number" if "e" in value.lower() else "no quotes"
    elif isinstance(value, int) and kind is str:
        try_ = "quotes: YAML reads 24:00:00 as a number of seconds" if field[-1] == "time" else f'quotes: "{value}"'
    raise document.error(field, f"must be {kind_text(kind)}", found=repr(value), try_=try_)


def _nearest(name: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return f"{close[0]}? One of {', '.join(known)}" if len(known) < 20 else f"{close[0]}?"


def _nearest_option(option: object, section: str) -> str:
    """The section that has the option, or else the most similar name in this one."""
    plain = str(option).lstrip("-").replace("-", "_")
    elsewhere = [other for other, options in SECTIONS.items() if plain in options]
    if elsewhere:
        return f"{elsewhere[0]}.{plain}"
    try_ = f"{section}.{difflib.get_close_matches(plain, SECTIONS[section], n=1, cutoff=0.0)[0]}?"
    return try_ if section in ("cluster", "scalemoe") else f"{try_} Flags of Megatron that no section has go into extra_flags"


def _completed(job: JobConfig) -> JobConfig:
    """With defaults, and with what follows from other values."""
    missing = [".".join(key) for key in REQUIRED if key not in job.values]
    if missing:
        raise ScaleMoEError(f"{job.path}: {', '.join(missing)} must be given")
    job = dataclasses.replace(job, values={**{key: Value(value, "default") for key, value in DEFAULTS.items()}, **job.values})
    job = dataclasses.replace(job, values={**_derived(job), **job.values})
    if job.get("moe", "moe_dispatcher") == "scalemoe":
        return job
    return dataclasses.replace(job, values={key: value for key, value in job.values.items() if key[0] != "scalemoe"})


def _derived(job: JobConfig) -> dict[Key, Value]:
    derived: dict[Key, tuple[Any, str]] = {("cluster", "job_name"): (f"scalemoe-{job.path.stem}", "the file's name")}
    if gpus := job.get("cluster", "gpus_per_node"):
        derived["cluster", "ranks_per_node"] = (gpus, "gpus_per_node")
    if job.get("moe", "num_experts") is not None:
        # pretrain_gpt.py's own default is allgather
        derived["moe", "moe_token_dispatcher_type"] = ("alltoall", "num_experts")
        derived["moe", "moe_dispatcher"] = ("stock", "there is no scalemoe section")
        if job.get("parallel", "tensor_model_parallel_size") > 1:
            derived["parallel", "sequence_parallel"] = (True, "experts with tensor parallelism need it")
    if job.program == "megatron_lm":
        derived["model", "max_position_embeddings"] = (job.get("model", "seq_length"), "seq_length")
        derived["training", "exit_signal_handler"] = (True, "a job that is stopped saves a checkpoint first")
    return {key: Value(value, "derived", reason) for key, (value, reason) in derived.items()}
