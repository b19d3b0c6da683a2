"""The command line as a user meets it: exit codes, streams, and a quick --help."""

import argparse
import subprocess
import sys

import pytest

import megatron_scalemoe
from megatron_scalemoe.cli import flags
from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.parser import build_parser, epilog

# As a program: `main` alone would not tell what was loaded before it was called.
HELP = """
import sys
from megatron_scalemoe.cli.main import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "megatron", "numpy", "scipy", "yaml", "psutil"} & set(sys.modules)
assert not heavy, heavy
"""


def exit_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_help_loads_nothing_heavy():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: scalemoe")


def test_a_user_error_exits_1_without_a_traceback():
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", "bench", "dispatch", "--experts", "8", "--ranks", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("scalemoe: error: --experts")
    assert "Traceback" not in result.stderr


def test_the_package_runs_as_a_program():
    command = [sys.executable, "-m", "megatron_scalemoe", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.startswith("scalemoe ")


@pytest.mark.parametrize(
    "error",
    [OSError(24, "Too many open files"), PermissionError(13, "Permission denied", "results/a.json"), MemoryError(), ImportError("no x")],
)
def test_what_the_system_refuses_is_one_error(error, monkeypatch, capsys):
    def refuse(args):
        raise error

    monkeypatch.setattr(flags, "run", refuse)
    assert main(["flags", "job.yaml"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("scalemoe: error: ")
    assert str(getattr(error, "filename", None) or "") in told


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("plann", "plan"),
        ("topology buidl", "build"),
        ("plan --topologie a --trace b", "--topology"),
        ("plan --topology=a --trace=b --replica=3", "--replicas"),
    ],
)
def test_a_near_miss_is_suggested(arguments, meant, capsys):
    assert exit_of(arguments.split()) == 2
    assert f"try:   {meant} for " in capsys.readouterr().err


def commands(parser, prog: str) -> list[str]:
    found = [prog]
    for action in parser._actions:
        for name, child in getattr(action, "choices", None).items() if isinstance(action, argparse._SubParsersAction) else ():
            found += commands(child, f"{prog} {name}")
    return found


def test_every_command_has_an_example():
    assert all(map(epilog, commands(build_parser(), "scalemoe")))


def test_version(capsys):
    assert exit_of(["--version"]) == 0
    assert capsys.readouterr().out == f"scalemoe {megatron_scalemoe.__version__}\n"


@pytest.mark.parametrize(
    "arguments", ["", "nonsense", "bench", "bench nonsense", "doctor --nonsense", "bench dispatch --tok 1", "doctor --jso"]
)
def test_wrong_usage_exits_2(arguments, capsys):
    assert exit_of(arguments.split()) == 2
    captured = capsys.readouterr()
    assert "usage: scalemoe" in captured.err
    assert captured.out == ""
