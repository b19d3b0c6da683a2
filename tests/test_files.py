"""Files that are written whole or not at all, and errors that name file, line and field."""

from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import check_writable, read_document, write_atomically


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(ScaleMoEError, match="the file exists"):
        write_atomically(path, "new", force=False)
    assert path.read_text() == "old"
    write_atomically(path, "new", force=True)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def full_disk(self, *args, **kwargs):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ScaleMoEError, match="No space left"):
        write_atomically(path, "new", force=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_missing_directory_is_refused_before_the_work(tmp_path):
    with pytest.raises(ScaleMoEError, match="mkdir -p"):
        check_writable(tmp_path / "no" / "r.json", force=False)
    with pytest.raises(ScaleMoEError, match="must name a file"):
        check_writable(tmp_path, force=True)


def document(tmp_path, text: str, name: str = "f.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return read_document(path)


def test_fields_are_fetched_with_their_kind(tmp_path):
    d = document(tmp_path, "a: 1\nb:\n  - x: 2.5\n  - x: 3\n")
    assert d.get(("a",), int) == 1
    assert d.get(("b", 1, "x"), float) == 3.0
    assert d.get(("c",), str, default=None) is None


@pytest.mark.parametrize(
    ("name", "text", "field", "kind", "message"),
    [
        ("f.yaml", "a: 1\nb:\n  - x: 2.5\n  - x: no\n", ("b", 1, "x"), float, r"f.yaml:4: b.1.x: must be a finite number"),
        ("f.json", '{\n"a": 1,\n"b": [1,\n true]}', ("b", 1), int, r"f.json:4: b.1: must be an integer"),
        ("f.yaml", "a: .nan\n", ("a",), float, r"f.yaml:1: a: must be a finite number"),
        ("f.yaml", "a: 1\n", ("b",), str, r"f.yaml:1: 'b' is missing"),
        ("f.yaml", "x: 0\na:\n  c: 1\n", ("a", "b"), str, r"f.yaml:2: a: 'b' is missing"),
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path, name, text, field, kind, message):
    with pytest.raises(ScaleMoEError, match=message):
        document(tmp_path, text, name).get(field, kind)


def test_unknown_keys_are_refused(tmp_path):
    with pytest.raises(ScaleMoEError, match=r"f.yaml:2: widht: unknown field"):
        document(tmp_path, "a: 1\nwidht: 2\n").only_keys((), {"a", "width"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.json", '{"a": 1,\n}', "f.json:2: not valid JSON"),
        ("f.json", '{"a": NaN}', "NaN"),
        ("f.json", "[" * 100_000, "cannot be parsed"),
        ("f.json", '{"a": ' + "9" * 5000 + "}", "cannot be parsed"),
        ("f.yaml", "a: [1\nb: 2", "f.yaml:2: not valid YAML"),
        ("f.yaml", "a: 2024-99-99", "cannot be parsed"),
        ("f.yaml", "- 1", "must be one mapping"),
        ("f.yaml", "", "must be one mapping"),
    ],
)
def test_what_cannot_be_parsed_is_a_user_error(tmp_path, name, text, message):
    with pytest.raises(ScaleMoEError, match=message):
        document(tmp_path, text, name)


def test_a_missing_or_binary_file_is_a_user_error(tmp_path):
    with pytest.raises(ScaleMoEError, match="cannot read the file"):
        read_document(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ScaleMoEError, match="not a text file"):
        read_document(tmp_path / "b.yaml")


def test_the_schema_version_is_checked(tmp_path):
    document(tmp_path, "schema_version: 1").check_schema()
    with pytest.raises(ScaleMoEError, match="schema_version: must be 1"):
        document(tmp_path, "schema_version: 2").check_schema()
