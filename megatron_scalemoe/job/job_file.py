"""Reading a job's file: every value with where it comes from, wrong ones refused with the line they are in.

schema_version: 1
program: megatron_lm            # or gpt_moe, bert_moe: the examples
base: paper_gpt_64.yaml         # this file's values first; those below win, null takes one back
model: {num_layers: 12, ...}    # sections: job/sections.py
extra_flags: [--log-throughput] # word by word, as they are
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_scalemoe.config import ScaleMoEConfig, flag_name
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import Document, read_document
from megatron_scalemoe.job.sections import FLAG_SECTIONS, SECTIONS, JobFile
from megatron_scalemoe.typed import Facts, SchemaVersion, check

_MAX_BASES = 8
_DEFAULTS = {
    ("parallel", "tensor_model_parallel_size"): 1,
    ("parallel", "pipeline_model_parallel_size"): 1,
    ("parallel", "expert_model_parallel_size"): 1,
    ("training", "micro_batch_size"): 1,
    ("training", "save_interval"): 1000,
    ("cluster", "nodes"): 1,
    ("cluster", "gpus_per_node"): 8,
    **{("scalemoe", name): field.default for name, field in ScaleMoEConfig.model_fields.items() if field.default not in (None, False)},
}
Field = tuple[str | int, ...]


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
        """For people: `job.yaml:12`, `default`, `derived: seq_length`."""
        return self.place if self.origin == "file" else self.origin + (f": {self.place}" if self.place else "")


@dataclasses.dataclass(frozen=True)
class Job:
    """A job: its file, its checked content, and its values with their origins.

    values: by section and option; of each section first what stands in the files, then what follows from that, then defaults.
    places: file and line of what stands in the files, sections and `extra_flags` included.
    """

    path: Path
    content: JobFile
    values: Mapping[Field, Value]
    places: Mapping[Field, str]

    def error(self, field: Field, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about one value: says where it was set."""
        return ScaleMoEError(problem, found=found, try_=try_, field=field, place=_place(self.path, self.places, field))


def flag_of(section: str, option: str) -> str | None:
    """`--num-layers`, `--scalemoe-replicas`; None for what is no flag."""
    if section == "cluster":
        return None
    return flag_name(option) if section == "scalemoe" else "--" + option.replace("_", "-")


def load_job(path: Path) -> Job:
    """The job in the file, with defaults and what follows from other values; not yet checked for contradictions (`checks.check_job`).

    Raises `ScaleMoEError`, naming file and line, for unknown names, wrong types and missing options.
    """
    top: dict[str, Any] = {"extra_flags": []}
    values: dict[Field, Value] = {}
    places: dict[Field, str] = {}
    for document in reversed(_with_bases(path)):
        for name, content in document.data.items():
            places[name,] = document.place((name,))
            if name not in SECTIONS or not isinstance(content, dict | None):
                top[name] = content
                continue
            for option, value in (content or {}).items():
                places[name, option] = document.place((name, option))
                values[name, option] = Value(value, "file", places[name, option])
    top.pop("base", None)
    _check_text(path, {**top, **{field: value.value for field, value in values.items()}}, places)
    values = _completed(path, top, {field: value for field, value in values.items() if value.value is not None}, ("scalemoe",) in places)
    try:
        return Job(path, _checked(top, values), values, places)
    except ScaleMoEError as error:
        raise error.at(_place(path, places, error.field)) from error


def _check_text(path: Path, content: Mapping[Any, Any], places: Mapping[Field, str]) -> None:
    """The values become lines of a script that runs: none may begin a line of its own, whatever its kind. Raises `ScaleMoEError`."""
    if not str(path).isprintable():
        raise ScaleMoEError("the job's file must have a name of printable characters", found=repr(str(path)))
    for name, value in content.items():
        field = name if isinstance(name, tuple) else (name,)
        words = [*map(str, field), *(value if isinstance(value, list) else [value])]
        for word in words:
            if isinstance(word, str) and not word.isprintable():
                problem = "must be one line of printable characters"
                raise ScaleMoEError(problem, found=repr(word)[:80], field=field, place=_place(path, places, field))


class _Head(Facts):
    schema_version: SchemaVersion
    base: str | None = None


def _with_bases(path: Path) -> list[Document]:
    """The file, its base, the base's base, ..."""
    documents = [read_document(path)]
    while (name := documents[-1].parse(_Head).base) is not None:
        document, base = documents[-1], documents[-1].path.parent / name
        if len(documents) > _MAX_BASES or any(base.resolve() == other.path.resolve() for other in documents):
            raise document.error(("base",), f"files must not be each other's base, nor more than {_MAX_BASES} deep", found=str(base))
        if not base.is_file():
            raise document.error(("base",), "names no file", found=str(base), try_="a path from this file's folder")
        documents.append(read_document(base))
    return documents


def _completed(path: Path, top: Mapping[str, Any], values: dict[Field, Value], has_scalemoe: bool) -> dict[Field, Value]:
    """With what follows from other values, and with defaults. Types are not checked yet."""
    derived: dict[Field, tuple[Any, str]] = {
        ("cluster", "job_name"): (f"scalemoe-{re.sub(r'[^A-Za-z0-9_.-]', '_', path.stem)}", "the file's name")
    }
    gpus = values.get(("cluster", "gpus_per_node"), Value(_DEFAULTS["cluster", "gpus_per_node"], "default")).value
    if gpus:
        derived["cluster", "ranks_per_node"] = (gpus, "gpus_per_node")
    if has_scalemoe:
        derived["moe", "moe_dispatcher"] = ("scalemoe", "there is a scalemoe section")
    if ("moe", "num_experts") in values:
        derived.setdefault(("moe", "moe_dispatcher"), ("stock", "there is no scalemoe section"))
        # pretrain_gpt.py's own default is allgather
        derived["moe", "moe_token_dispatcher_type"] = ("alltoall", "num_experts")
        if values.get(("parallel", "tensor_model_parallel_size"), Value(1, "default")).value != 1:
            derived["parallel", "sequence_parallel"] = (True, "experts with tensor parallelism need it")
    if top.get("program") == "megatron_lm":
        if ("model", "seq_length") in values:
            derived["model", "max_position_embeddings"] = (values["model", "seq_length"].value, "seq_length")
        derived["training", "exit_signal_handler"] = (True, "a job that is stopped saves a checkpoint first")
    values = values | {field: Value(value, "derived", why) for field, (value, why) in derived.items() if field not in values}
    values |= {field: Value(value, "default") for field, value in _DEFAULTS.items() if field not in values}
    dispatcher = values.get(("moe", "moe_dispatcher"))
    ours = dispatcher is not None and dispatcher.value == "scalemoe"
    return {field: value for field, value in values.items() if ours or field[0] != "scalemoe"}


def _checked(top: Mapping[str, Any], values: Mapping[Field, Value]) -> JobFile:
    sections: dict[str, dict] = {section: {} for section in SECTIONS}
    for (section, option), value in values.items():
        sections[section][option] = value.value
    home = _homes(values)
    try:
        content = check(JobFile, {**sections, **top})
    except ScaleMoEError as error:
        found = values.get(error.field)
        if found is None or error.try_ is not None:
            raise
        raise ScaleMoEError(error.problem, found=error.found, try_=_yaml_hint(found.value, error), field=error.field) from error
    try:
        check(ScaleMoEConfig, content.scalemoe)
    except ScaleMoEError as error:
        raise ScaleMoEError(error.problem, found=error.found, try_=error.try_, field=("scalemoe", *error.field)) from error
    _check_extra_flags(content.extra_flags, home)
    return content


def _yaml_hint(value: object, error: ScaleMoEError) -> str | None:
    """What to try where YAML read a value as another type than was meant."""
    if isinstance(value, str) and ("number" in error.problem or "integer" in error.problem):
        return "a point: YAML reads 1e-4 as text, and 1.0e-4 as a number" if "e" in value.lower() else "no quotes"
    if isinstance(value, int) and error.problem == "must be text":
        return "quotes: YAML reads 24:00:00 as a number of seconds" if error.field[-1] == "time" else f'quotes: "{value}"'
    return None


def _homes(values: Mapping[Field, Value]) -> dict[str, str]:
    """The section of each option. Raises `ScaleMoEError` for one that stands in another."""
    home = {name: section for section, model in FLAG_SECTIONS.items() for name in model.model_fields}
    for section, option in values:
        if section in FLAG_SECTIONS and home.setdefault(option, section) != section:
            raise ScaleMoEError("stands in another section", try_=f"{home[option]}.{option}", field=(section, option))
    return home


def _check_extra_flags(words: list[str], home: Mapping[str, str]) -> None:
    """An option that a section has must stand there, where it is checked."""
    options = [(section, name) for name, section in home.items()] + [("scalemoe", name) for name in ScaleMoEConfig.model_fields]
    of_flag = {flag_of(section, name): (section, name) for section, name in options}
    for index, word in enumerate(words):
        if found := of_flag.get(word.split("=")[0]):
            raise ScaleMoEError(f"{word} has a section", try_=f"{found[0]}: {{{found[1]}: ...}}", field=("extra_flags", index))


def _place(path: Path, places: Mapping[Field, str], field: Field) -> str:
    """Where the field stands, or the nearest of its parents that stands in a file; else the job's file."""
    return next((places[field[:size]] for size in range(len(field), 0, -1) if field[:size] in places), str(path))
