"""Where checkpoints lie and when one is whole: Megatron's layout, `DIR/iter_0000100/` and `DIR/latest_checkpointed_iteration.txt`.

A checkpoint is written under a hidden name and renamed when complete, so that every `iter_*` directory is a whole one; only then does the
tracker file name it. Whatever goes wrong before leaves the earlier checkpoints as they were. Nothing here needs `torch.distributed`: call
it on one rank.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes, read_document, write_atomically
from megatron_scalemoe.mcore.checkpoint.metadata import check_objects, read_metadata

TRACKER = "latest_checkpointed_iteration.txt"
_SAVING = ".saving_"
# No run has more iterations than this many digits can number.
_MOST_DIGITS = 15


def iteration_path(directory: Path, iteration: int) -> Path:
    """The directory of one iteration's checkpoint."""
    return directory / f"iter_{iteration:07d}"


def latest_iteration(directory: Path) -> int | None:
    """The iteration that the tracker file names; None where nothing was saved yet. Raises `ScaleMoEError` if it is not a number."""
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = read_bytes(tracker).decode(errors="replace").strip()
    if not text.isdecimal() or len(text) > _MOST_DIGITS:
        raise ScaleMoEError(
            f"{tracker} must hold the number of an iteration", found=repr(text[:40]), try_=_other_iterations(directory, None)
        )
    return int(text)


def find_checkpoint(directory: Path, iteration: int | None) -> tuple[int, Path]:
    """A whole checkpoint to load: that of `iteration`, or the latest. Raises `ScaleMoEError` if there is none, or it is damaged."""
    if iteration is None:
        iteration = latest_iteration(directory)
    if iteration is None:
        raise ScaleMoEError(f"no checkpoint in {directory}", found=f"no {TRACKER}", try_=_other_iterations(directory, None))
    path = iteration_path(directory, iteration)
    damage = find_damage(path)
    if damage:
        problem = f"the checkpoint of iteration {iteration} in {directory} cannot be loaded"
        raise ScaleMoEError(problem, found=damage, try_=_other_iterations(directory, iteration))
    check_objects(path, read_metadata(path))
    return iteration, path


def find_damage(path: Path) -> str | None:
    """What makes a checkpoint directory unusable, with the file's name; None if every file is there in full length."""
    try:
        backend = read_document(path / "metadata.json").data.get("sharded_backend")
        stored = read_metadata(path).storage_data
    except ScaleMoEError as error:
        return str(error)
    if backend != "torch_dist":
        return f"{path} has the format {backend}, not torch_dist"
    in_a_file = not any(index.fqn.startswith("common_state") for index in stored)  # Megatron-Core 0.19 has it among the tensors
    if in_a_file and not zipfile.is_zipfile(path / "common.pt"):
        return f"{path / 'common.pt'} is missing or truncated"
    for info in stored.values():
        file, needed = path / info.relative_path, info.offset + info.length
        if not file.exists():
            return f"{file} does not exist"
        if file.stat().st_size < needed:
            return f"{file} is truncated: {file.stat().st_size} bytes, of at least {needed}"
    return None


def start_writing(directory: Path, iteration: int) -> Path:
    """An empty directory to write a checkpoint into; `publish` gives it its name. Raises `ScaleMoEError` if it cannot be made."""
    path = directory / f"{_SAVING}{iteration_path(directory, iteration).name}"
    try:
        for left in directory.glob(f"{_SAVING}iter_*"):  # by a run that died while saving: it would keep the disk full
            shutil.rmtree(left, ignore_errors=True)
        path.mkdir(parents=True)
    except OSError as error:
        raise ScaleMoEError(f"cannot write a checkpoint to {directory}", found=error, try_="another --save directory") from error
    return path


def publish(written: Path, directory: Path, iteration: int, files: Mapping[str, str]) -> Path:
    """Make a complete checkpoint the latest one: on disk first, then under its name, then in the tracker file. `files` lie beside it."""
    write_beside(written, files)
    for file in written.rglob("*"):
        _sync(file)
    _sync(written)
    path = iteration_path(directory, iteration)
    replaced = directory / f".replaced_{path.name}"
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    written.rename(path)
    _sync(directory)
    tracker = directory / f".{TRACKER}"
    tracker.write_text(str(iteration))
    _sync(tracker)
    tracker.replace(directory / TRACKER)
    _sync(directory)
    shutil.rmtree(replaced, ignore_errors=True)
    return path


def write_beside(checkpoint: Path, files: Mapping[str, str]) -> None:
    """Write texts into a checkpoint's directory. It is whole without them, so one that cannot be written is a warning."""
    for name, text in files.items():
        try:
            write_atomically(checkpoint / name, text, force=True)
        except ScaleMoEError as error:
            warnings.warn(f"the checkpoint is whole, but {name} is missing beside it: {error}", stacklevel=2)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _other_iterations(directory: Path, but: int | None) -> str:
    """Advice for someone whose checkpoint is damaged: the whole ones."""
    names = [re.fullmatch(r"iter_(\d{7,})", path.name) for path in directory.glob("iter_*")]
    whole = sorted(int(m[1]) for m in names if m and int(m[1]) != but and find_damage(directory / m[0]) is None)
    if not whole:
        return f"another directory: {directory} holds no other whole checkpoint"
    return "--ckpt-step " + " or ".join(str(iteration) for iteration in reversed(whole[-3:]))
