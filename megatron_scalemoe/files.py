"""Reading and writing the planner's files: written whole or not at all, read with errors that name file, line and field."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_scalemoe.errors import ScaleMoEError

SCHEMA_VERSION = 1
_REQUIRED: Any = object()
_KINDS = {int: "an integer", float: "a finite number", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}


def check_output(path: Path | None, *, force: bool) -> None:
    """Raises `ScaleMoEError` if `--output` could not be written: called before a long run, not only after it."""
    if path is None:
        return
    # Not Path's own tests: they raise on a name that is too long.
    if os.path.isdir(path):
        raise ScaleMoEError("--output must name a file", found=f"the directory {path}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ScaleMoEError("--output must name a regular file: it is replaced by a new one", found=f"the device or pipe {path}")
    if os.path.exists(path) and not force:
        raise ScaleMoEError(f"--output: {path} exists", try_="--force to overwrite it, or another name")
    if not os.path.isdir(path.parent):
        raise ScaleMoEError("--output: the directory does not exist", found=path.parent, try_=f"mkdir -p {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ScaleMoEError("--output: the directory is not writable", found=path.parent)


def write_atomically(path: Path, content: str | bytes, *, force: bool) -> None:
    """Writes a file through a temporary one beside it, so that no reader ever sees half of it. Overwrites only with `force`."""
    check_output(path, force=force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise ScaleMoEError(f"--output: cannot write {path}", found=error) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """The file's bytes. Raises `ScaleMoEError` when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ScaleMoEError(f"{path}: cannot read the file", found=error.strerror or error) from error


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed JSON or YAML file whose fields are fetched with checks. `field` is the path of keys and indices to a value."""

    path: Path
    text: str
    data: dict

    def error(self, field: tuple, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about one field: names the file, the line and the field."""
        name = ".".join(map(str, field))
        return ScaleMoEError(
            f"{self.place(field)}: {name}: {problem}" if name else f"{self.place(field)}: {problem}", found=found, try_=try_
        )

    def place(self, field: tuple) -> str:
        """`file.yaml:12`, the line of the field; without a line if it cannot be told."""
        line = _line_of(self.text, field)
        return f"{self.path}:{line}" if line else str(self.path)

    def get(self, field: tuple, kind: type, default: Any = _REQUIRED) -> Any:
        """The value at `field`, which must be a `kind` (`int` counts as `float`; NaN and infinities never do)."""
        *parents, last = field
        value: Any = self.data
        for key in parents:
            value = value[key]
        if isinstance(value, dict) and last not in value:
            if default is _REQUIRED:
                raise self.error(tuple(parents), f"{last!r} is missing", try_=f"add {last}: {_KINDS[kind]}")
            return default
        value = value[last]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        ok = is_number and -1e300 < value < 1e300 and math.isfinite(value) if kind is float else isinstance(value, kind)
        if not ok or (kind is int and isinstance(value, bool)):
            raise self.error(field, f"must be {_KINDS[kind]}", found=_short(value))
        return float(value) if kind is float else value

    def only_keys(self, field: tuple, allowed: set[str]) -> None:
        """Refuses unknown keys of the mapping at `field`: a typing error must not be ignored."""
        mapping: Any = self.data
        for key in field:
            mapping = mapping[key]
        for key in mapping:
            if key not in allowed:
                raise self.error((*field, key), "unknown field", try_=f"one of {', '.join(sorted(allowed))}")

    def check_schema(self) -> None:
        """Raises unless `schema_version` is the one that this version writes."""
        version = self.get(("schema_version",), int)
        if version != SCHEMA_VERSION:
            raise self.error(
                ("schema_version",), f"must be {SCHEMA_VERSION}", found=version, try_="the scalemoe version that wrote the file"
            )


def read_document(path: Path) -> Document:
    """Parses a `.json` file as JSON and any other as YAML. Raises `ScaleMoEError` naming file and line unless it is one mapping."""
    import yaml  # here, as in `_line_of`: every sub-command imports this module, and --help must be quick

    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScaleMoEError(f"{path}: not a text file", found=f"byte {error.start} is not UTF-8") from error
    try:
        data = json.loads(text, parse_constant=_no_constant) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ScaleMoEError(f"{path}:{error.lineno}: not valid JSON", found=f"{error.msg}, column {error.colno}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ScaleMoEError(f"{place}: not valid YAML", found=getattr(error, "problem", None) or error) from error
    except (ValueError, TypeError, RecursionError) as error:  # YAML's own constructors; numbers too long; nesting too deep
        raise ScaleMoEError(f"{path}: cannot be parsed", found=error) from error
    if not isinstance(data, dict):
        raise ScaleMoEError(f"{path}: must be one mapping of fields", found=_short(data))
    return Document(path, text, data)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number here")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _line_of(text: str, field: tuple) -> int | None:
    """Line of the last key of `field` that exists, by parsing again with positions (JSON is YAML)."""
    import yaml

    try:
        node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    line = node.start_mark.line + 1 if node else None
    for key in field:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == str(key)]
            if not found:
                return line
            key_node, node = found[-1]
            line = key_node.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            return line
    return line
