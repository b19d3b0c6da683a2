"""Each command of the documentation has a row in docs/commands.md: the test that executes it, or the reason why none does."""

import re
from pathlib import Path

from tests.docs.docs_pages import PAGES, ROOT, TABLE, Row, fenced_commands, inline_commands, table_rows


def row_of(command: str, rows: list[Row]) -> Row | None:
    return max((row for row in rows if row.covers(command)), key=lambda row: len(row.command), default=None)


def faults(row: Row) -> list[str]:
    """A test must be there, and name the command's script or sub-command, or the page that it takes the command from."""
    if not row.tests():
        return [] if row.executed == "not executed" and row.how else ["neither a test nor `not executed` and a reason"]
    found, names = [], [row.subject(), *re.findall(r"`(docs/[^`]+)`", row.how)]
    for name in row.tests():
        file, _, function = name.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8") if (ROOT / file).is_file() else ""
        if not Path(file).name.startswith("test_") or f"def {function or 'test_'}" not in text:
            found.append(f"{name} is not there")
        elif not any(name in text + file for name in names):
            found.append(f"{file} names none of {names}")
    return found


def test_every_command_has_a_row_and_every_row_its_test():
    rows = table_rows(TABLE.read_text(encoding="utf-8"))
    texts = [path.read_text(encoding="utf-8") for path in PAGES]
    used = {command: row_of(command, rows) for text in texts for command in fenced_commands(text) + inline_commands(text)}
    assert len(used) > 50
    assert not [command for command, row in used.items() if row is None]
    assert not [row.command for row in rows if row not in used.values()], "rows that fit no command any more"
    assert not {row.command: found for row in rows if (found := faults(row))}
    assert faults(Row("squeue", "`tests/tools/test_slurm.py::test_nothing`", "")), "this test can fail"
