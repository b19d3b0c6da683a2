"""npz files of ours: arrays, and `meta`, a JSON text with the schema version. Written whole or not at all, read without pickle."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import SCHEMA_VERSION, read_bytes, write_atomically

_ZIP = b"PK\x03\x04"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, object], *, force: bool) -> None:
    """Writes compressed npz, atomically. Raises `ScaleMoEError` if `path` exists and `force` is not set."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays, meta=np.array(json.dumps({**meta, "schema_version": SCHEMA_VERSION})))
    write_atomically(path, buffer.getvalue(), force=force)


def load_arrays(path: Path, names: tuple[str, ...], *, try_: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays called `names`, all of which must be there, and `meta`. `try_`: where a user gets such a file.

    Raises `ScaleMoEError` naming file and array.
    """
    raw = read_bytes(path)
    if not raw.startswith(_ZIP):
        raise ScaleMoEError(f"{path}: not a readable npz file", found=f"a file that begins with {raw[:16]!r}", try_=try_)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # BadZipFile, zlib.error, ValueError, MemoryError of a corrupt header...: npz has no one error of its own
        raise ScaleMoEError(f"{path}: not a readable npz file", found=error, try_=try_) from error
    for name in (*names, "meta"):
        # A member that is no array at all comes back as bytes.
        if not isinstance(arrays.get(name), np.ndarray):
            raise ScaleMoEError(f"{path}: {name}: the array is missing", found=f"arrays {sorted(arrays)}", try_=try_)
    return {name: arrays[name] for name in names}, _parse_meta(path, arrays["meta"])


def _parse_meta(path: Path, array: np.ndarray) -> dict:
    try:
        meta = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise ScaleMoEError(f"{path}: meta: must be JSON text", found=error) from error
    if not isinstance(meta, dict) or meta.get("schema_version") != SCHEMA_VERSION:
        raise ScaleMoEError(f"{path}: meta: must be a JSON mapping of schema_version {SCHEMA_VERSION}", found=str(meta)[:80])
    return meta
