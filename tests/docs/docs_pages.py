"""The documentation's commands, the output that it prints below them, and the table that says what executes each: docs/commands.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "commands.md"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").glob("*.md") if page != TABLE),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "patches").rglob("*.md")),
    ROOT / "csrc" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = "scalemoe|bash|sh|python3?|torchrun|pip|git|docker|enroot|apptainer|sbatch|srun|squeue|scontrol|sudo|eval|pytest|export|make"
# Two blanks after the first word: a line of a table.
COMMAND = re.compile(rf"(?:\w+=\S+ )*(?:\.venv/bin/)?(?:{PROGRAMS})(?: (?! )|$)")
NUMBER = re.compile(r"\d+(\.\d+)?")
VERDICT = re.compile(r"(Fastest|(?:Not w|W)orth moving): .*")


class Row(NamedTuple):
    """Of the table. A command with ` ...` at its end: all that begin so."""

    command: str
    executed: str
    how: str

    def tests(self) -> list[str]:
        """As `file` or `file::function`."""
        return re.findall(r"`(tests/[^`]+)`", self.executed)

    def covers(self, command: str) -> bool:
        start = self.command.removesuffix(" ...")
        return command == start or (start != self.command and command.startswith(start + " "))

    def subject(self) -> str:
        """The module, script or sub-command: what a test that executes the command has to name."""
        words = self.command.removesuffix(" ...").removeprefix("$ ").split()
        if "-m" in words:
            return words[words.index("-m") + 1]
        script = next((word for word in words if re.search(r"\w\.(py|sh)$", word)), None)
        flag = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
        return Path(script).stem if script else words[flag - 1]


def table_rows(text: str) -> list[Row]:
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    return [Row(command.strip("`"), executed, how) for command, executed, how in cells]


def plain(command: str) -> str:
    """One line without comment, and without variables and folder before the program."""
    command = re.sub(r"\s+# .*", "", command.replace("\\\n", " "))
    return re.sub(r"^(\w+=\S+ )*(\.venv/bin/)?", "", " ".join(command.split()))


def fenced_commands(text: str) -> list[str]:
    """Lines after `$ ` if a block has any, with the `$ `; all lines of a shell block; in blocks of no language, lines of known programs."""
    found = []
    for language, block in FENCE.findall(text):
        lines = [line for line in block.replace("\\\n", " ").splitlines() if line]
        shown = [line for line in lines if line.startswith("$ ")]
        if shown:
            found += [f"$ {plain(line[2:])}" for line in shown]
        elif language in ("sh", "bash"):
            found += map(plain, lines)
        elif not language:
            found += [plain(line) for line in lines if COMMAND.match(line)]
    return found


def inline_commands(text: str) -> list[str]:
    """`like this`, of two words or more; `torchrun ... Error` is something that a page talks about."""
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)))
    commands = (plain(span) for span in spans if COMMAND.match(span))
    return [command for command in commands if " " in command and command.split()[1] != "..."]


def shown_runs(text: str) -> list[tuple[str, str, int]]:
    """Command, printed output and exit code of each `$ ` line."""
    runs = []
    for _, block in FENCE.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            code = re.search(r"^\(exit code (\d+)\)\n", output, re.MULTILINE)
            output = output.replace(code[0], "") if code else output
            runs.append((plain(command), output.strip("\n"), int(code[1]) if code else int("error: " in output)))
    return runs


def is_output(printed: str, real: str) -> bool:
    """Whether the page's text is the run's, where a line of `...` stands for any number of lines."""
    lines = (r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in printed.splitlines())
    return re.fullmatch("".join(lines), "".join(line.rstrip() + "\n" for line in real.strip("\n").splitlines())) is not None


def without_measured(text: str) -> str:
    """The same with # for what a search or a measurement found: numbers, but for a table's labels and its contiguous placement.

    On a busy machine the clock may cut a search, which is said in a line of its own.
    """
    done, text = [], re.sub(r"^The time budget cut the search short.*\n?", "", text, flags=re.MULTILINE)
    for lines in (part.splitlines() for part in text.split("\n\n")):
        rule = next((index for index, line in enumerate(lines) if re.fullmatch(r"-+( +-+)+", line)), None)
        table = [] if rule is None else lines[rule - 1 :]
        sentences = lines[: len(lines) - len(table)]
        done += [*(NUMBER.sub("#", VERDICT.sub(r"\1", line)) for line in sentences), *_labels(table), ""]
    return "\n".join(done)


def _labels(table: list[str]) -> list[str]:
    """Header, then the rows in the order of their labels: `topology measure` puts the slowest first."""
    if not table:
        return []
    columns = [slice(*match.span()) for match in re.finditer("-+", table[1])]
    header, *rows = ([line[column].strip() for column in columns] for line in (table[0], *table[2:]))
    for row in rows:
        for index in range(1, len(row)):
            fixed = "contiguous" in (row[0], header[index]) and header[index] != "plan s"
            row[index] = row[index] if fixed or not row[index] else "#"
    return [" | ".join(row) for row in (header, *sorted(rows))]
