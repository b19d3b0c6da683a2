"""Which software and machine this is, for `scalemoe doctor` and beside every measured number. Needs neither torch nor megatron."""

import datetime
import errno
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import megatron_scalemoe
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.version import __version__

# The tested releases, each with its later patches, as in pyproject.toml's `train` extra. The first is for every supported Python.
MEGATRON_CORE_RELEASES = ("0.16.1", "0.19.0")

# Where processes of ours start: `python -m` looks for modules in its working directory first, and the user's may hold any `networkx.py`.
PACKAGE_PARENT = Path(megatron_scalemoe.__file__).resolve().parent.parent


def installed_version(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed, without importing it."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def code_digest() -> str:
    """Equal where the package's Python files are: the same version may have been edited on one machine."""
    digest = hashlib.sha256()
    package = PACKAGE_PARENT / "megatron_scalemoe"
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def is_supported_megatron(version: str) -> bool:
    """Whether a megatron-core version is of a release that we test, or a later patch of one. A release candidate counts as its release."""
    found = _release(version)
    return any(release[:2] == found[:2] and release <= found for release in map(_release, MEGATRON_CORE_RELEASES))


def refusal(error: OSError | MemoryError | ImportError) -> ScaleMoEError:
    """What the system refused (a file, memory, a library), as the one error that users see."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else f", in {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    if isinstance(error, MemoryError):
        return ScaleMoEError("out of memory", found=f"{error}{where}".strip(", "), try_="a larger ulimit -v, or less work")
    if isinstance(error, ImportError):
        return ScaleMoEError("a package cannot be imported", found=f"{error}{where}", try_="scalemoe doctor says what is missing")
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    try_ = "a larger ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else None
    return ScaleMoEError("the system refused", found=f"{error.strerror or error}{where}", try_=try_, place=" -> ".join(names) or None)


def describe_environment(command: list[str]) -> dict[str, object]:
    """Everything needed to judge or repeat a measurement made by `command`: no host name, no user name."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "megatron_scalemoe": __version__,
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "megatron_core": installed_version("megatron-core"),
        "numpy": installed_version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
    }


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, `-dirty` when files differ; None when it was installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    # An installed copy may lie inside somebody else's repository: that commit would say nothing about us.
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _release(version: str) -> tuple[int, ...]:
    """`0.16.1rc0+local` -> (0, 16, 1)."""
    numbers = [int(n) for n in re.match(r"\d+(\.\d+)*", version).group().split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))
