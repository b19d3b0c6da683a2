"""tools/_venv.sh without the network: a stand-in for the venv's Python records what pip is asked, and installs nothing. No CUDA torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_PYTHON = """#!/bin/bash
if [[ "$1 $2" == "-m pip" ]]; then
    echo "$@" >> "{log}"
    [[ "$3" == --version || ! -e "{log}.fail" ]]
    exit
fi
[[ "$2" != *torch.version.cuda* ]] || exit 1
exec {python} "$@"
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What _venv.sh looks at, with a .venv whose Python is the stand-in."""
    for folder in ("tools", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "megatron_scalemoe").symlink_to(ROOT / "megatron_scalemoe")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON.format(log=tmp_path / "pip.log", python=sys.executable))
    python.chmod(0o755)
    return tmp_path


def ensure_venv(checkout: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", "set -euo pipefail; source tools/_venv.sh; echo $VENV_PYTHON"]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(command, cwd=checkout, env={"PATH": path, **environment}, capture_output=True, text=True, timeout=120)


def installs(checkout: Path) -> list[str]:
    return [line for line in (checkout / "pip.log").read_text().splitlines() if "install" in line]


def test_pip_is_asked_at_first_when_requirements_change_and_after_a_failure(checkout):
    first = ensure_venv(checkout)
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout}/.venv/bin/python\n"
    assert installs(checkout) == [f"-m pip install --quiet torch==2.13.0 -e {checkout}[train,report,dev]"]
    assert ensure_venv(checkout).returncode == 0
    assert len(installs(checkout)) == 1
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("# changed\n")
    (checkout / "pip.log.fail").touch()
    failed = ensure_venv(checkout)
    assert failed.returncode == 1
    assert "error: pip could not install the package" in failed.stderr
    (checkout / "pip.log.fail").unlink()
    assert ensure_venv(checkout).returncode == 0
    assert len(installs(checkout)) == 3


def test_an_unsuitable_python_is_named(checkout):
    shutil.rmtree(checkout / ".venv")
    result = ensure_venv(checkout, PYTHON="/bin/false")
    assert result.returncode == 1
    assert "no Python 3.10 to 3.13 found (tried /bin/false)" in result.stderr
    assert "try: " in result.stderr
    assert not (checkout / ".venv").exists()
