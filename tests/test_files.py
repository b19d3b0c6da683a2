"""Files that are written whole or not at all, and errors that name file, line and field."""

import os
import socket
from pathlib import Path

import pytest
from pydantic import Field

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import check_writable, read_document, write_atomically
from megatron_scalemoe.typed import Model, Number, SchemaVersion


def refusal(function, *args, **options) -> ScaleMoEError:
    with pytest.raises(ScaleMoEError) as caught:
        function(*args, **options)
    return caught.value


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    assert refusal(write_atomically, path, "new", force=False).place == str(path)
    assert path.read_text() == "old"
    write_atomically(path, "new", force=True)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(("fault", "raised"), [(OSError("No space left"), ScaleMoEError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, fault, raised):
    path = tmp_path / "r.json"
    path.write_text("old")

    def replace(self, target):
        raise fault

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(raised):
        write_atomically(path, "new", force=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_planted_link_is_replaced_not_followed(tmp_path):
    theirs, path = tmp_path / "theirs", tmp_path / "r.json"
    theirs.write_text("theirs")
    path.symlink_to(theirs)
    write_atomically(path, "new", force=True)
    assert theirs.read_text() == "theirs"
    assert not path.is_symlink() and path.read_text() == "new"


def make_special(path: Path, kind: str) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link loop":
        path.symlink_to(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "8 GiB":
        with path.open("wb") as file:
            file.truncate(8 << 30)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    return path


SPECIAL = ("pipe", "directory", "link loop", "socket", "8 GiB", "endless", "nothing")


@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_of_some_size_are_read(tmp_path, kind):
    path = make_special(tmp_path / "f.yaml", kind)
    assert refusal(read_document, path).place == str(path)


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    assert "mkdir -p" in refusal(check_writable, tmp_path / "no" / "r.json", force=False).try_
    assert "not a directory" in refusal(check_writable, tmp_path, force=True).problem
    assert "regular file" in refusal(check_writable, Path("/dev/null"), force=True).problem


class Item(Model):
    x: Number = Field(ge=0)


class File(Model):
    schema_version: SchemaVersion
    a: int = 0
    b: list[Item] = Field(default_factory=list)


def read_as(model: type[File], path: Path) -> File:
    return read_document(path).parse(model)


def written(tmp_path: Path, text: str, name: str = "f.yaml") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


# Nine times nine times nine ... values.
ALIASES = "".join(f"x{level}: &x{level} [{', '.join([f'*x{level - 1}' if level else '1'] * 9)}]\n" for level in range(12))


def test_a_file_is_read_as_its_model(tmp_path):
    for path in (
        written(tmp_path, "schema_version: 1\na: 1\nb:\n  - x: 2.5\n  - x: 3\n"),
        written(tmp_path, '{"schema_version": 1, "a": 1, "b": [{"x": 2.5}, {"x": 3}]}', "f.json"),
    ):
        assert read_as(File, path) == File(schema_version=1, a=1, b=[Item(x=2.5), Item(x=3.0)])


@pytest.mark.parametrize(
    ("name", "text", "line", "field", "problem"),
    [
        ("f.yaml", "a: 1\nb:\n  - x: 2.5\n  - x: no\n", 4, "b.1.x", "must be a finite number"),
        ("f.yaml", "b:\n  - x: .nan\n", 2, "b.0.x", "must be a finite number"),
        ("f.yaml", "b:\n  - x: 1.0e+301\n", 2, "b.0.x", "must be a finite number"),
        ("f.yaml", "b:\n  - x: -1\n", 2, "b.0.x", "must be 0 or more"),
        ("f.yaml", "b:\n  - {}\n", 2, "b.0", "'x' is missing"),
        ("f.yaml", "b: 1\n", 1, "b", "must be a list"),
        ("f.yaml", "b: [1]\n", 1, "b.0", "must be a mapping"),
        ("f.json", '{\n"a": true,\n"schema_version": 1}', 2, "a", "must be an integer"),
        ("f.yaml", "a: 1\nwidht: 2\n", 2, "widht", "unknown field"),
        ("f.yaml", "\nschema_version: 2\n", 2, "schema_version", "must be 1"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path, name, text, line, field, problem):
    if "schema_version" not in text:
        text += "schema_version: 1\n"
    error = refusal(read_as, File, written(tmp_path, text, name))
    assert error.place == f"{tmp_path / name}:{line}"
    assert (".".join(map(str, error.field)), problem) == (field, error.problem)


def test_a_name_that_stands_twice_is_refused_with_both_lines(tmp_path):
    assert refusal(read_document, written(tmp_path, "b:\n  nodes: 4\n  gpus: 8\n  nodes: 8\n")).found == "in lines 2 and 4"
    assert "twice" in refusal(read_document, written(tmp_path, '{"b": [{"nodes": 4, "nodes": 8}]}', "f.json")).problem
    merged = "base: &base {x: 1, y: 2}\nother:\n  <<: *base\n  x: 3\nagain: {<<: [*base, {z: 4}]}\n"
    assert read_document(written(tmp_path, merged)).data["other"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", '{"a": 1,\n}', "f.json:2: not valid JSON"),
        ("f.json", '{"a": NaN}', "NaN"),
        ("f.json", "[" * 100_000, "cannot be parsed"),
        ("f.yaml", "[" * 100_000, "not valid YAML"),
        ("f.json", '{"a": ' + "9" * 5000 + "}", "cannot be parsed"),
        ("f.yaml", "a: [1\nb: 2", "f.yaml:2: not valid YAML"),
        ("f.yaml", "a: 2024-99-99", "f.yaml:1: cannot be parsed"),
        ("f.yaml", "x: 1\na: !!bool 3", "f.yaml:2: cannot be parsed"),
        ("f.yaml", "a: !!timestamp x", "f.yaml:1: cannot be parsed"),
        ("f.yaml", "a: !!python/object:os.system x", "not valid YAML"),
        ("f.yaml", "a: &a [1, *a]", "contains itself"),
        ("f.yaml", ALIASES, "at most 10000000 values"),
        ("f.yaml", "- 1", "must be one mapping"),
        ("f.yaml", "1: 2", "must be one mapping"),
        ("f.yaml", "", "must be one mapping"),
        ("f.yaml", "a: \udcff", "not a text file"),
    ],
)
def test_what_cannot_be_parsed_is_a_user_error(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in str(refusal(read_document, tmp_path / name))


def test_a_missing_file_is_a_user_error(tmp_path):
    assert refusal(read_document, tmp_path / "none.yaml").place == str(tmp_path / "none.yaml")
