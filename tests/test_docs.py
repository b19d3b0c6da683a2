"""Each command of the documentation has a row in docs/commands.md: the test that executes it, or the reason why none does.

Each check is a small function that is also shown something bad, so that it is known to be able to fail.
"""

import re
from pathlib import Path

import pytest

from tests.docs_pages import PAGES, ROOT, TABLE, Row, fenced_commands, inline_commands, table_rows

ROWS = table_rows(TABLE.read_text(encoding="utf-8"))
TEXTS = [path.read_text(encoding="utf-8") for path in PAGES]
PAGE = """
Start with `bash tools/a.sh
--flag`; `scalemoe` and `torchrun ... Error` are no commands.

```
A=1 .venv/bin/scalemoe plan \\
    -o x          # a comment
scalemoe    1.0
made-up output
```
```sh
anything here
```
```
$ python b.py
scalemoe: error: output
```
```python
scalemoe = 1
```
"""


def commands(text: str) -> list[str]:
    return fenced_commands(text) + inline_commands(text)


def row_of(command: str, rows: list[Row]) -> Row | None:
    return max((row for row in rows if row.covers(command)), key=lambda row: len(row.command), default=None)


def uncovered(text: str, rows: list[Row]) -> list[str]:
    return [command for command in commands(text) if row_of(command, rows) is None]


def stale(texts: list[str], rows: list[Row]) -> list[str]:
    used = [row_of(command, rows) for text in texts for command in commands(text)]
    return [row.command for row in rows if row not in used]


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


def test_commands_are_found():
    assert commands(PAGE) == ["scalemoe plan -o x", "anything here", "$ python b.py", "bash tools/a.sh --flag"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_has_a_row(path):
    assert uncovered(path.read_text(encoding="utf-8"), ROWS) == []


def test_a_command_without_a_row_is_noticed():
    rows = [Row("scalemoe plan ...", "", ""), Row("anything", "", ""), Row("bash tools/a.sh", "", "")]
    assert uncovered(PAGE, rows) == ["anything here", "$ python b.py", "bash tools/a.sh --flag"]


def test_no_row_is_stale():
    assert stale(TEXTS, ROWS) == []


def test_a_stale_row_is_noticed():
    rows = [Row("scalemoe plan ...", "", ""), Row("scalemoe plan -o ...", "", ""), Row("scalemoe", "", "")]
    assert stale([PAGE], rows) == ["scalemoe plan ...", "scalemoe"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.command)
def test_the_tests_of_a_row_are_there(row):
    assert faults(row) == []


@pytest.mark.parametrize(
    ("command", "executed"),
    [
        ("squeue", "not executed"),
        ("squeue", "by hand"),
        ("squeue", "`tests/test_nowhere.py`"),
        ("squeue", "`tests/docs_pages.py`"),
        ("squeue", "`tests/test_slurm.py::test_nothing`"),
        ("scalemoe topology guess ...", "`tests/test_slurm.py`"),
        ("bash tools/guess.sh --all", "`tests/test_slurm.py`"),
        ("python -m guess", "`tests/test_slurm.py`"),
    ],
)
def test_a_row_without_its_test_is_noticed(command, executed):
    assert faults(Row(command, executed, "")) != []
    assert faults(Row("squeue", "`tests/test_slurm.py`", "")) == []
