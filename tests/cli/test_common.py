"""Tables and output flags."""

import argparse
import json

from megatron_scalemoe.cli.common import add_output_flags, emit, format_table


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
