"""The command line as a user meets it: exit codes, streams, and a quick --help."""

import subprocess
import sys

import pytest


def scalemoe(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["doctor", "--help"], ["bench", "--help"], ["bench", "dispatch", "--help"]])
def test_help(arguments):
    result = scalemoe(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: scalemoe")
    assert result.stderr == ""


def test_version():
    import megatron_scalemoe

    assert scalemoe("--version").stdout == f"scalemoe {megatron_scalemoe.__version__}\n"


def test_help_loads_nothing_heavy():
    code = """
import sys
from megatron_scalemoe.cli.main import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "megatron", "numpy", "scipy", "yaml", "psutil"} & set(sys.modules)
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["bench"],
        ["bench", "nonsense"],
        ["doctor", "--nonsense"],
        ["bench", "dispatch", "--tok", "1"],
        ["doctor", "--jso"],
    ],
)
def test_wrong_usage_exits_2(arguments):
    result = scalemoe(*arguments)
    assert result.returncode == 2
    assert "usage: scalemoe" in result.stderr
    assert result.stdout == ""


def test_a_user_error_exits_1_without_a_traceback():
    result = scalemoe("bench", "dispatch", "--experts", "8", "--ranks", "3")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == "scalemoe: error: --experts must be a multiple of --ranks\n  found: --experts 8 --ranks 3\n"
