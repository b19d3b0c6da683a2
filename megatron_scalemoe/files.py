"""Reading and writing files: written whole or not at all, read with errors that name file, line and field."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_scalemoe.errors import ScaleMoEError

# yaml and pydantic only here and in functions: every sub-command imports this module, and --help must be quick.
if TYPE_CHECKING:
    import yaml

    from megatron_scalemoe.typed import ModelT

# Of a document, which is parsed as a whole.
DOCUMENT_BYTES = 64 << 20
_MOST_VALUES = 10_000_000


def check_writable(path: Path, *, force: bool) -> None:
    """Raises `ScaleMoEError` if `path` could not be written: called before a long run, not only after it."""
    # Not Path's own tests: they raise on a name that is too long.
    if os.path.isdir(path):
        raise ScaleMoEError("must name a file, not a directory", place=str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise ScaleMoEError("must be a regular file, not a device or pipe: it is replaced by a new one", place=str(path))
    if os.path.exists(path) and not force:
        raise ScaleMoEError("the file exists", try_="another name", place=str(path))
    if not os.path.isdir(path.parent):
        raise ScaleMoEError("the directory does not exist", try_=f"mkdir -p {path.parent}", place=str(path))
    if not os.access(path.parent, os.W_OK):
        raise ScaleMoEError("the directory is not writable", place=str(path))


def write_atomically(path: Path, content: str | bytes, *, force: bool) -> None:
    """Writes a file through a temporary one beside it, so that no reader ever sees half of it. Overwrites only with `force`."""
    check_writable(path, force=force)
    temporary = path.with_name(f".scalemoe-{secrets.token_hex(8)}.tmp")
    try:
        # In a folder that others can write to, no name may be known before, and no link of theirs be followed.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise ScaleMoEError("cannot write the file", found=error, place=str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)


def read_bytes(path: Path, *, most: int = DOCUMENT_BYTES) -> bytes:
    """The file's bytes. Raises `ScaleMoEError` when it cannot be read, is no regular file, or larger than `most` bytes."""
    with open_regular(path, most=most) as file:
        return file.read(most)


def open_regular(path: Path, *, most: int) -> BinaryIO:
    """Opens a file to read. Raises `ScaleMoEError` for a pipe or device, which may have no end, and beyond `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for a writer
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ScaleMoEError("cannot read the file", found=getattr(error, "strerror", None) or error, place=str(path)) from error
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and facts.st_size <= most:
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(facts.st_mode):
        raise ScaleMoEError("cannot read the file", found="a directory", place=str(path))
    if not stat.S_ISREG(facts.st_mode):
        raise ScaleMoEError("must be a regular file", found="a pipe or device", try_="write it to a file first", place=str(path))
    raise ScaleMoEError(f"a file of this kind has at most {most >> 20} MiB", found=f"{facts.st_size >> 20} MiB", place=str(path))


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A parsed JSON or YAML file. A `field` is the path of keys and indices to a value."""

    path: Path
    text: str
    data: dict

    def parse(self, model: type[ModelT]) -> ModelT:
        """All of it as a typed model (`typed.Model`). Raises `ScaleMoEError` naming file, line and field."""
        from megatron_scalemoe.typed import check

        try:
            return check(model, self.data)
        except ScaleMoEError as error:
            raise self.located(error) from error

    def located(self, error: ScaleMoEError) -> ScaleMoEError:
        """An error about the file's content, with the file and the line of the error's field."""
        return error.at(self.place(error.field))

    def error(self, field: tuple, problem: str, *, found: object = None, try_: str | None = None) -> ScaleMoEError:
        """The error to raise about one field: names the file, the line and the field."""
        return ScaleMoEError(problem, found=found, try_=try_, field=field, place=self.place(field))

    def place(self, field: tuple) -> str:
        """`file.yaml:12`, the line of the field, or of the last of its parents that there is."""
        return _place(self.path, self._line_of(field))

    def _line_of(self, field: tuple) -> int | None:
        node = self._node
        line = node and _line(node)
        for key in field:
            if node is not None and node.id == "mapping":
                key_node, node = next(((k, v) for k, v in node.value if k.value == str(key)), (None, None))
                line = _line(key_node) if key_node is not None else line
            elif node is not None and node.id == "sequence" and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                line = _line(node)
            else:
                return line
        return line

    @functools.cached_property
    def _node(self) -> yaml.Node | None:
        """The content with its lines (JSON is YAML); None if they cannot be told."""
        import yaml

        try:
            return yaml.compose(self.text, Loader=_yaml_loader())
        except (yaml.YAMLError, RecursionError, ValueError):
            return None


def read_document(path: Path) -> Document:
    """Parses a `.json` file as JSON and any other as YAML. Raises `ScaleMoEError` naming file and line unless it is one mapping, and no
    mapping in it has a name twice."""
    import yaml

    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ScaleMoEError("not a text file", found=f"byte {error.start} is not UTF-8", place=str(path)) from error
    try:
        data = _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except ScaleMoEError as error:
        raise error.at(f"{path}:{error.place}" if error.place else str(path)) from error
    except json.JSONDecodeError as error:
        raise ScaleMoEError("not valid JSON", found=f"{error.msg}, column {error.colno}", place=_place(path, error.lineno)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = _place(path, mark and mark.line + 1)
        raise ScaleMoEError("not valid YAML", found=getattr(error, "problem", None) or error, place=place) from error
    except Exception as error:  # YAML's constructors raise anything (`!!bool 3`: KeyError); numbers too long; nesting too deep
        raise ScaleMoEError("cannot be parsed", found=error, place=str(path)) from error
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise ScaleMoEError("must be one mapping of named fields", found=repr(data)[:80], place=str(path))
    return Document(path, text, data)


def _parse_json(text: str) -> Any:
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_mapping)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number here")


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = {}
    for name, value in pairs:
        if name in mapping:
            raise ScaleMoEError(f"{name!r} is given twice", try_="leave one out")
        mapping[name] = value
    return mapping


def _parse_yaml(text: str) -> Any:
    loader = _yaml_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(loader, node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _yaml_loader() -> type:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_node(loader: Any, node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values the node stands for. Raises `ScaleMoEError` with its line for a name given twice, of which YAML would take the last,
    a value that is not what its tag says, and aliases that stand for millions. sizes: of nodes that are checked, 0 while they are."""
    if (size := sizes.get(id(node))) is not None:
        if size == 0:
            raise ScaleMoEError("cannot be parsed", found="a value that contains itself", place=str(_line(node)))
        return size
    if node.id == "scalar":
        try:
            loader.construct_object(node)
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            found = f"{node.value[:80]!r} as {node.tag.rpartition(':')[2]}"
            raise ScaleMoEError("cannot be parsed", found=found, place=str(_line(node))) from error
        return 1
    sizes[id(node)] = 0
    size = 1
    lines: dict[tuple[str, str], int] = {}
    for item in node.value:
        key, value = item if node.id == "mapping" else (None, item)
        size += _check_node(loader, value, sizes)
        if size > _MOST_VALUES:
            raise ScaleMoEError(f"at most {_MOST_VALUES} values, aliases counted as what they stand for", place=str(_line(node)))
        if key is None or key.id != "scalar":
            continue
        name = (key.tag, key.value)
        if name in lines:
            found = f"in lines {lines[name]} and {_line(key)}"
            raise ScaleMoEError(f"{key.value} is given twice", found=found, try_="leave one out", place=str(_line(key)))
        lines[name] = _line(key)
    sizes[id(node)] = size
    return size


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _place(path: Path, line: int | None) -> str:
    return f"{path}:{line}" if line else str(path)
