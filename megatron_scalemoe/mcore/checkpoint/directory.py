"""Where checkpoints lie and when one is whole: Megatron's layout, `DIR/iter_0000100/` and `DIR/latest_checkpointed_iteration.txt`.

A checkpoint is written under a hidden name and renamed when complete, so that every `iter_*` directory is a whole one; only then does the
tracker file name it. Whatever goes wrong before leaves the earlier checkpoints as they were. Nothing here needs `torch.distributed`: call
it on one rank.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader

from megatron_scalemoe.errors import ScaleMoEError

TRACKER = "latest_checkpointed_iteration.txt"


def iteration_path(directory: Path, iteration: int) -> Path:
    """The directory of one iteration's checkpoint."""
    return directory / f"iter_{iteration:07d}"


def latest_iteration(directory: Path) -> int | None:
    """The iteration that the tracker file names; None where nothing was saved yet. Raises `ScaleMoEError` if it is not a number."""
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if not text.isdecimal():
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
    return iteration, path


def find_damage(path: Path) -> str | None:
    """What makes a checkpoint directory unusable, with the file's name; None if every file is there in full length."""
    try:
        config = json.loads((path / "metadata.json").read_text())
    except FileNotFoundError:
        return f"{path / 'metadata.json'} does not exist"
    except ValueError:
        return f"{path / 'metadata.json'} is not JSON"
    if config.get("sharded_backend") != "torch_dist":
        return f"{path} has the format {config.get('sharded_backend')}, not torch_dist"
    try:
        stored = FileSystemReader(path).read_metadata().storage_data
    except Exception as error:  # unpickling a damaged file can raise anything
        return f"{path / '.metadata'} cannot be read: {type(error).__name__}"
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
    path = directory / f".saving_{iteration_path(directory, iteration).name}"
    try:
        shutil.rmtree(path, ignore_errors=True)  # left by a run that died while saving
        path.mkdir(parents=True)
    except OSError as error:
        raise ScaleMoEError(f"cannot write a checkpoint to {directory}", found=error, try_="another --save directory") from error
    return path


def publish(written: Path, directory: Path, iteration: int, files: Mapping[str, str]) -> Path:
    """Make a complete checkpoint the latest one: on disk first, then under its name, then in the tracker file. `files` lie beside it."""
    for name, text in files.items():
        (written / name).write_text(text)
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
