"""Saving and loading a Megatron model with its optimizer, in Megatron's own format, at any expert-parallel size.

What `save_checkpoint` writes is what Megatron-Core 0.16's training script writes (`torch_dist`, expert tensors by logical expert), so
stock Megatron loads it, and `load_checkpoint` loads what stock Megatron wrote. Both are collective: every rank calls them with the same
arguments. The distributed optimizer is saved in the `fully_reshardable` format, which does not depend on the layout of ranks. Checksums of
all parameters and optimizer state are saved with them, and compared when they have been loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.checksums import CHECKSUMS_KEY, check_state, state_checksums
from megatron_scalemoe.mcore.checkpoint.directory import find_checkpoint, publish, start_writing
from megatron_scalemoe.mcore.checkpoint.layout import check_optimizer_layout, expert_order
from megatron_scalemoe.mcore.checkpoint.optimizer import (
    FULLY_RESHARDABLE,
    check_optimizer,
    is_distributed,
    load_optimizer_state,
    optimizer_parts,
    prepare_optimizer_state,
    ranges_without_padding,
    sharded_optimizer_state,
)
from megatron_scalemoe.mcore.checkpoint.rng import restore_rng_state, sharded_rng_state

_RESERVED = ("checkpoint_version", "iteration", "optimizer", "opt_param_scheduler", "rng_state", "content_metadata", CHECKSUMS_KEY)
_OPTIMIZER_PARTS = "optimizer_parts"  # beside the checkpoint's own nesting of the optimizer, which depends on its expert-parallel size


@dataclasses.dataclass(frozen=True)
class LoadedCheckpoint:
    """What `load_checkpoint` found: the iteration, its directory, the caller's `extra` values, and whether the generators continue as in
    the saved run."""

    iteration: int
    path: Path
    extra: dict[str, Any]
    rng_restored: bool


def check_checkpoint_support(optimizer: Any = None) -> None:
    """Raises `ScaleMoEError` if a checkpoint could not be saved or loaded later; call it at start, before hours of training."""
    if not filesystem_async.HAVE_PSUTIL:  # on GPUs the library's writer process would die, and its parent wait for ever
        raise ScaleMoEError("saving a checkpoint needs psutil", found="psutil is not installed", try_="pip install psutil")
    if optimizer is not None:
        check_optimizer(optimizer)


def save_checkpoint(
    directory: str | Path,
    iteration: int,
    model_chunks: list[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Save all state under `directory` and make it the latest checkpoint; returns its path.

    `extra` holds plain values, the same on every rank, that `load_checkpoint` gives back; `args` and
    `num_floating_point_operations_so_far` are names that stock Megatron reads. `files` are texts to lie beside it, by name, such as
    `LiveBalance.checkpoint_files()`. Raises `ScaleMoEError` if the checkpoint cannot be written;
    the one before is then still whole and the latest.
    """
    check_checkpoint_support(optimizer)
    _check_extra(extra or {})
    _gather_weights(model_chunks)
    groups = checkpoint_groups()
    metadata = _save_metadata(optimizer, groups)
    model_state = sharded_model_state(model_chunks, metadata)
    state = {"checkpoint_version": 3.0, "iteration": iteration, **(extra or {}), **model_state}
    state[CHECKSUMS_KEY] = state_checksums(model_state.values(), optimizer)
    if optimizer is not None:
        prepare_optimizer_state(optimizer)
        with ranges_without_padding(optimizer_parts(optimizer)):
            state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    if scheduler is not None:
        state["opt_param_scheduler"] = scheduler.state_dict()
    state["rng_state"] = sharded_rng_state(groups)
    directory = Path(directory)
    written = _on_first_rank(start_writing, directory, iteration)
    strategy = FullyParallelSaveStrategyWrapper(serialization.get_default_save_sharded_strategy(), groups.dp_cp)
    stored_metadata = {key: value for key, value in metadata.items() if key != "dp_cp_group"}
    try:
        with _as_user_error(f"could not save iteration {iteration} to {directory}"):
            serialization.save(state, str(written), strategy, content_metadata=stored_metadata)
    except ScaleMoEError:
        shutil.rmtree(written, ignore_errors=True)  # half a checkpoint would keep the disk full
        raise
    return _on_first_rank(publish, written, directory, iteration, files or {})


def load_checkpoint(
    directory: str | Path,
    model_chunks: list[torch.nn.Module],
    optimizer: Any = None,
    scheduler: Any = None,
    *,
    iteration: int | None = None,
    weights_only: bool = False,
) -> LoadedCheckpoint:
    """Load the latest checkpoint of `directory`, or that of `iteration` (`--ckpt-step`), into a model of any TP, PP, EP and DP size.

    With `weights_only` the optimizer, scheduler and generators stay as they are, but for the optimizer's copy of the weights. Raises
    `ScaleMoEError`, naming file and iteration, if there is no such checkpoint, a file is missing or damaged, it does not fit the model, or
    what was loaded is not what was saved.
    """
    iteration, path = _on_first_rank(find_checkpoint, Path(directory), iteration)
    groups = checkpoint_groups()
    with _as_user_error(f"cannot load the checkpoint of iteration {iteration}, {path}"):
        common = serialization.load_common_state_dict(str(path))
        metadata = {**(common.get("content_metadata") or {}), "dp_cp_group": groups.dp_cp}
        if optimizer is not None and not weights_only and is_distributed(optimizer):
            reads = expert_order(model_chunks)
            check_optimizer_layout(path, metadata.get("distrib_optim_sharding_type"), common.get("args"), reads)
        stored = serialization.load_sharded_metadata(str(path))
        wanted = _wanted_state(model_chunks, None if weights_only else optimizer, metadata, stored, groups)
        state, unused, absent = serialization.load(wanted, str(path), strict=StrictHandling.RETURN_ALL)
        _check_fit(path, stored, unused, absent)
        for name, chunk in named_chunks(model_chunks).items():
            chunk.load_state_dict(state[name])
        if optimizer is not None and weights_only:
            optimizer.reload_model_params()
        elif optimizer is not None:
            parts = state.get(_OPTIMIZER_PARTS, {})
            load_optimizer_state(optimizer, parts, common.get("optimizer"), metadata)
        if CHECKSUMS_KEY in common:
            model_state = sharded_model_state(model_chunks, metadata)
            check_state(path, common[CHECKSUMS_KEY], model_state.values(), None if weights_only else optimizer)
        if scheduler is not None and not weights_only:
            scheduler.load_state_dict(common["opt_param_scheduler"])
    rng_restored = "rng_state" in wanted and restore_rng_state(state["rng_state"], groups.dp_cp)
    extra = {name: value for name, value in common.items() if not _is_reserved(name)}
    return LoadedCheckpoint(iteration, path, extra, rng_restored)


def _wanted_state(
    model_chunks: list, optimizer: Any, metadata: dict, stored: dict[str, ShardedBase], groups: ProcessGroupCollection
) -> dict[str, Any]:
    """The sharded state dict that tells the library what this rank reads, and into which tensors."""
    wanted = sharded_model_state(model_chunks, metadata)
    if optimizer is not None:
        prepare_optimizer_state(optimizer)
        keys = {entry.key for entry in stored.values()}
        wanted[_OPTIMIZER_PARTS] = sharded_optimizer_state(optimizer, wanted, metadata, keys)
        rng_state = sharded_rng_state(groups)
        if rng_state.unique_key in stored:  # absent if saved with another layout of ranks
            wanted["rng_state"] = rng_state
    return wanted


def _check_fit(path: Path, stored: dict[str, ShardedBase], unused: set[str], absent: set[str]) -> None:
    """Raises `ScaleMoEError`, on every rank, if some rank misses an entry or the checkpoint holds weights that no rank has asked for."""
    all_absent: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_absent, sorted(absent))
    missing = sorted(set().union(*all_absent))
    weights = {entry.key for entry in stored.values() if isinstance(entry, ShardedTensor)}
    surplus = sorted(key for key in unused & weights if not key.startswith(("optimizer.", "chained_")))
    for keys, problem in ((missing, "lacks what this model has"), (surplus, "holds weights that this model does not have")):
        if keys:
            found = f"{', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
            raise ScaleMoEError(f"{path} {problem}", found=found, try_="the model flags that it was saved with")


def _gather_weights(model_chunks: list) -> None:
    """What the distributed optimizer has written on other ranks, where gathering it waits for the next forward."""
    for chunk in model_chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def sharded_model_state(model_chunks: list, metadata: dict) -> dict[str, dict]:
    """The sharded state dict of each model chunk, under its name in a checkpoint, with the parameters themselves as data."""
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in named_chunks(model_chunks).items()}


def named_chunks(model_chunks: list) -> dict[str, torch.nn.Module]:
    """`model`, or `model0`, `model1`, ... for the chunks of an interleaved pipeline, without DDP and precision wrappers."""
    chunks = unwrap_model(model_chunks)
    return {"model" if len(chunks) == 1 else f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _save_metadata(optimizer: Any, groups: ProcessGroupCollection) -> dict[str, Any]:
    """How the state is laid out in the file; a loader needs the same, so it is saved with it."""
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, "dp_cp_group": groups.dp_cp}
    if optimizer is not None and is_distributed(optimizer):
        metadata["distrib_optim_sharding_type"] = FULLY_RESHARDABLE
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    return metadata


def checkpoint_groups() -> ProcessGroupCollection:
    """Megatron's process groups that a checkpoint's format depends on."""
    return ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "ep", "dp_cp"])


def _check_extra(extra: dict[str, Any]) -> None:
    """Raises `ScaleMoEError` unless `extra` can be read back: Megatron reads plain values with torch's restricted unpickler."""
    reserved = sorted(name for name in extra if _is_reserved(name))
    if reserved:
        raise ScaleMoEError("extra values need names that the checkpoint does not use itself", found=", ".join(reserved))
    for name, value in extra.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as error:
            raise ScaleMoEError("extra values of a checkpoint must be plain data", found=f"{name} is a {type(value).__name__}") from error


def _is_reserved(name: str) -> bool:
    return name in _RESERVED or name.startswith("model")


def _on_first_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, called on rank 0 only; all ranks return its result, or raise a `ScaleMoEError` with its error."""
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            with _as_user_error("rank 0 failed to read or write a checkpoint"):
                outcome[0] = function(*arguments)
        except ScaleMoEError as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextlib.contextmanager
def _as_user_error(problem: str) -> Iterator[None]:
    """Whatever the library or the file system raises becomes a `ScaleMoEError`."""
    try:
        yield
    except ScaleMoEError:
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is no Exception
        raise ScaleMoEError(problem, found=_cause(error)) from error


def _cause(error: BaseException) -> str:
    """The first line of what went wrong on some rank."""
    if isinstance(error, CheckpointException):
        # torch raises it on all ranks together, but the errors are on that which led
        causes: list[str] = [""] * torch.distributed.get_world_size()
        mine = next((f"rank {rank}: {_cause(failure)}" for rank, (failure, _) in error.failures.items()), "")
        torch.distributed.all_gather_object(causes, mine)
        return next(filter(None, causes), "an error that torch.distributed.checkpoint does not name")
    return f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
