"""Tables, and result files that are written whole or not at all."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_scalemoe.cli.common import add_output_flags, check_output, emit, format_table, write_atomically
from megatron_scalemoe.errors import ScaleMoEError


def output_args(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_output_flags(parser)
    return parser.parse_args(arguments)


def test_table_aligns_numbers_to_the_right():
    table = format_table(["name", "ms", "note"], [["a", "9.50", ""], ["long name", "10.25", "x"]])
    assert table.splitlines() == [
        "name          ms  note",
        "---------  -----  ----",
        "a           9.50",
        "long name  10.25  x",
    ]


def test_table_without_rows():
    assert format_table(["a", "bb"], []) == "a  bb\n-  --"


def test_emit_prints_the_table_and_writes_the_json(tmp_path, capsys):
    path = tmp_path / "r.json"
    emit(output_args("-o", str(path)), {"x": 1}, "the table")
    assert capsys.readouterr().out == "the table\n"
    assert json.loads(path.read_text()) == {"x": 1}


def test_emit_json(capsys):
    emit(output_args("--json"), {"x": 1}, "the table")
    assert json.loads(capsys.readouterr().out) == {"x": 1}


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("old")
    with pytest.raises(ScaleMoEError, match="--force"):
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

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(ScaleMoEError, match="No space left"):
        write_atomically(path, "new", force=True)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_missing_directory_is_refused_before_the_work(tmp_path):
    with pytest.raises(ScaleMoEError, match="mkdir -p"):
        check_output(tmp_path / "no" / "r.json", force=False)
    with pytest.raises(ScaleMoEError, match="must name a file"):
        check_output(tmp_path, force=True)
