"""Finds and loads the native libraries that setup.py builds from csrc/: plain C functions, called through ctypes.

They know nothing of torch or Python, so one build serves every version of both. `cpu()` and `cuda()` return None where there is none, and
`why_not()` says why; everything works without them in plain torch, but for the transports `shm` and `cuda`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from pathlib import Path

# For tests and sanitizer builds: the directory that holds the libraries.
LIBRARY_DIR_VARIABLE = "SCALEMOE_LIBRARY_DIR"
BUILT = Path(__file__).resolve().parent / "lib"
SOURCES = Path(__file__).resolve().parent.parent.parent / "csrc"


def cpu() -> ctypes.CDLL | None:
    """The library of the CPU ops and of shared memory between ranks."""
    return _load("cpu")[0]


def cuda() -> ctypes.CDLL | None:
    """The library of the CUDA kernels. Loads without a GPU."""
    return _load("cuda")[0]


def why_not(kind: str) -> str | None:
    """Why there is no library of this kind ("cpu" or "cuda"); None if there is one."""
    return _load(kind)[1]


@functools.cache
def _load(kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    override = os.environ.get(LIBRARY_DIR_VARIABLE)
    path = Path(override or BUILT) / f"libscalemoe_{kind}.so"
    if not path.exists():
        return None, f"{LIBRARY_DIR_VARIABLE}={override} has no {path.name}" if override else _why_not_built(kind)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path} does not load: {error}"
    source_hash = getattr(library, f"scalemoe_{kind}_source_hash")
    source_hash.restype = ctypes.c_char_p
    if not override and SOURCES.is_dir() and source_hash().decode() != _hash_of_sources(kind):
        return None, f"{path.name} was built from other sources than {SOURCES / kind}: run pip install -e . again"
    return library, None


def _why_not_built(kind: str) -> str:
    try:
        outcome = json.loads((BUILT / "build.json").read_text())[kind]
    except (OSError, ValueError, KeyError):
        missing = "C++ compiler (g++)" if kind == "cpu" else "nvcc"
        return f"there was no {missing} when this package was installed: install it, then run pip install again"
    return f"not built: {outcome.get('why_not', 'the library is missing')}"


def _hash_of_sources(kind: str) -> str:
    """As setup.py's `source_hash`."""
    digest = hashlib.sha256()
    for path in sorted((SOURCES / kind).iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
