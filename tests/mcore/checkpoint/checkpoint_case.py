"""What the ranks of test_checkpoint.py do. Imported by pool workers only."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from tests.mcore.tiny_gpt import Setup, Training  # first: it installs the CPU ranks

# isort: split
import megatron.core.dist_checkpointing as dist_checkpointing
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_plain_tensors, load_sharded_metadata

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint import checkpoint
from megatron_scalemoe.mcore.checkpoint.checkpoint import LoadedCheckpoint, load_checkpoint, save_checkpoint

Losses = list[float]


def save(training: Training, directory: Path, **extra) -> None:
    save_checkpoint(directory, training.step, [training.model], training.optimizer, training.scheduler, extra)


def load(directory: Path, setup: Setup, **options) -> tuple[Training, LoadedCheckpoint]:
    """A new run, of other initial weights if `setup` has another seed, that continues the saved one."""
    training = Training(setup)
    loaded = load_checkpoint(directory, [training.model], training.optimizer, training.scheduler, **options)
    training.step = loaded.iteration
    return training, loaded


def resume_with_dropout(directory: Path, options: dict) -> tuple[Losses, Losses, bool, dict]:
    """Losses of an uninterrupted run and of one resumed from it, whether Python's generator continued, and the extra values."""
    training = Training(Setup(dropout=0.1, **options))
    training.losses(2)
    random.seed(parallel_state.get_data_parallel_rank())  # a state that differs between the ranks
    save(training, directory, consumed_samples=16)
    number = random.random()
    want = training.losses(3)
    resumed, loaded = load(directory, Setup(dropout=0.1, seed=9, **options))
    same_number = random.random() == number
    return want, resumed.losses(3), same_number and loaded.rng_restored, loaded.extra


def train_and_save(directory: Path, options: dict) -> Losses:
    """The losses after the checkpoint."""
    training = Training(Setup(**options))
    training.losses(2)
    save(training, directory)
    return training.losses(3)


def resume(directory: Path, options: dict, save_to: Path | None = None, **how) -> Losses:
    """The losses after loading `directory`; `save_to` saves again in between, which must give the same tensors."""
    training, loaded = load(directory, Setup(seed=9, **options), **how)
    if save_to:
        save(training, save_to)
        assert stored_differences(loaded.path, save_to / loaded.path.name) == []
    return training.losses(3)


def stored_differences(one: Path, other: Path) -> list[str]:
    """Keys that are not in both checkpoints with the same shape, type and values; random states, one per rank, aside."""
    loaded = [load_sharded_metadata(str(path)) for path in (one, other)]
    entries = [{key: entry for key, entry in found.items() if entry.key != "rng_state"} for found in loaded]
    different = sorted(entries[0].keys() ^ entries[1].keys())
    tensors = [load_plain_tensors(str(path)) for path in (one, other)]
    for key, entry in entries[0].items():
        if isinstance(entry, ShardedTensor) and key in entries[1]:
            a, b = tensors[0][key], tensors[1][key]
            if a.dtype != b.dtype or not torch.equal(a, b):
                different.append(key)
    return different


def stock_writes(directory: Path, options: dict, metadata: dict) -> Losses:
    """Saves as Megatron's training script does, without its optional entries; the losses after that."""
    training = Training(Setup(**options))
    training.losses(2)
    path = directory / "iter_0000002"
    path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    with_group = {**metadata, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunk = checkpoint.unwrap_model(training.model)
    state = {"checkpoint_version": 3.0, "iteration": training.step, "model": chunk.sharded_state_dict(metadata=with_group)}
    state["optimizer"] = training.optimizer.sharded_state_dict(state, metadata=with_group)
    state["opt_param_scheduler"] = training.scheduler.state_dict()
    dist_checkpointing.save(state, str(path), content_metadata=metadata or None)
    (directory / "latest_checkpointed_iteration.txt").write_text("2")
    torch.distributed.barrier()
    return training.losses(3)


def stock_reads(directory: Path, options: dict) -> Losses:
    """Loads as Megatron's training script does, at the expert-parallel size of the checkpoint; the losses after that."""
    training = Training(Setup(seed=9, **options))
    path = str(directory / "iter_0000002")
    chunk = checkpoint.unwrap_model(training.model)
    metadata = dist_checkpointing.load_content_metadata(path)
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    wanted = {"model": chunk.sharded_state_dict(metadata=metadata)}
    wanted["optimizer"] = training.optimizer.sharded_state_dict(wanted, is_loading=True, metadata=metadata)
    state = dist_checkpointing.load(wanted, path)
    chunk.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.scheduler.load_state_dict(state["opt_param_scheduler"])
    training.step = state["iteration"]
    return training.losses(3)


def before_the_first_step(directory: Path, options: dict) -> tuple[Losses, Losses]:
    training = Training(Setup(**options))
    save(training, directory)
    want = training.losses(3)
    resumed, _ = load(directory, Setup(seed=9, **options))
    return want, resumed.losses(3)


def damaged(directory: Path) -> dict[str, str]:
    """What is said about each kind of damage to iteration 2; iteration 1 must still load."""
    training = Training(Setup(ep=2))
    for _ in range(2):
        training.losses(1)
        save(training, directory)
    newest = directory / "iter_0000002"
    messages = {}
    # Megatron-Core 0.19 writes no common.pt
    for name in sorted({"__1_0.distcp", "common.pt", ".metadata", "metadata.json"} & {file.name for file in newest.iterdir()}):
        _on_first_rank(lambda name=name: _truncate(newest / name, directory / "kept"))
        messages[name] = refusal(lambda: load(directory, Setup(ep=2)))
        _on_first_rank(lambda name=name: shutil.copy(directory / "kept", newest / name))
    assert load(directory, Setup(ep=2), iteration=1)[1].iteration == 1
    messages["other experts"] = refusal(lambda: load(directory, Setup(ep=2, experts=4)))
    messages["no such iteration"] = refusal(lambda: load(directory, Setup(ep=2), iteration=7))
    messages["no checkpoint"] = refusal(lambda: load(directory / "nowhere", Setup(ep=2)))
    _on_first_rank(lambda: (directory / "latest_checkpointed_iteration.txt").write_text("release"))
    messages["tracker"] = refusal(lambda: load(directory, Setup(ep=2)))
    return messages


def interrupted(directory: Path) -> dict:
    """A save that fails with its files half written, then saves that work, over each other."""
    training = Training(Setup(ep=2))
    training.losses(1)
    save(training, directory)
    training.losses(1)
    genuine = checkpoint.serialization.save

    def fail(state, path, *args, **kwargs):
        genuine(state, path, *args, **kwargs)
        raise OSError("No space left on device")

    with mock.patch.object(checkpoint.serialization, "save", fail):
        message = refusal(lambda: save(training, directory))
    _, kept = load(directory, Setup(ep=2))
    save(training, directory)
    save(training, directory)
    _, latest = load(directory, Setup(ep=2))
    return dict(message=message, kept=kept.iteration, latest=latest.iteration, files=sorted(path.name for path in directory.iterdir()))


def refused_load(directory: Path, options: dict) -> str:
    return refusal(lambda: load(directory, Setup(**options)))


def planted(directory: Path, options: dict) -> dict[str, str]:
    """What is said about state that is not what was saved: exchanged on its way into memory, or in the files."""
    training = Training(Setup(**options))
    for _ in range(2):
        training.losses(1)
        save(training, directory)
    messages = {}
    for mistake in (_swap_moments, _swap_main_parameters):
        with mock.patch.object(checkpoint, "load_optimizer_state", _followed_by(mistake)):
            messages[mistake.__name__] = refusal(lambda: load(directory, Setup(**options)))
    shards = sorted(file.name for file in (directory / "iter_0000002").glob("__*.distcp"))
    _on_first_rank(lambda: shutil.copy(directory / "iter_0000001" / shards[-1], directory / "iter_0000002" / shards[-1]))
    messages["shard of another iteration"] = refusal(lambda: load(directory, Setup(**options)))
    return messages


def _followed_by(mistake: Callable[[object], None]) -> Callable:
    genuine = checkpoint.load_optimizer_state

    def load_wrongly(optimizer, *args):
        genuine(optimizer, *args)
        mistake(optimizer)

    return load_wrongly


def _swap_moments(optimizer) -> None:
    """Of two experts, or of two weights of the same size."""
    state = optimizer.chained_optimizers[1].optimizer.state
    _swap(*[values["exp_avg"] for values in state.values()][:2])


def _swap_main_parameters(optimizer) -> None:
    group = optimizer.chained_optimizers[1].optimizer.param_groups[0]["params"]
    _swap(group[0].data, group[1].data)


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    """All values of tensors of the same size; of a stacked weight, the first two experts' part."""
    if one.shape != other.shape or one.dim() == 3:
        one, other = one[: len(one) // 2], one[len(one) // 2 :]
    kept = one.clone()
    one.copy_(other.reshape(one.shape))
    other.copy_(kept.reshape(other.shape))


def refused_extra(directory: Path) -> list[str]:
    training = Training(Setup(ep=2))
    return [refusal(lambda: save(training, directory, rng_state=1)), refusal(lambda: save(training, directory, step=save))]


def refused_support() -> list[str]:
    """What `check_checkpoint_support` says about SGD, and without psutil."""
    training = Training(Setup(ep=2))
    messages = []
    inner = training.optimizer.chained_optimizers[0]
    inner.optimizer = torch.optim.SGD(inner.optimizer.param_groups, lr=1.0)
    messages.append(refusal(lambda: checkpoint.check_checkpoint_support(training.optimizer)))
    with mock.patch.object(checkpoint.filesystem_async, "HAVE_PSUTIL", False):
        messages.append(refusal(lambda: save(training, Path("never written"))))
    return messages


def refusal(action: Callable[[], object]) -> str:
    """The message of the `ScaleMoEError` that an action must raise."""
    try:
        action()
    except ScaleMoEError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _on_first_rank(action: Callable[[], object]) -> None:
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        action()
    torch.distributed.barrier()


def _truncate(file: Path, keep: Path) -> None:
    shutil.copy(file, keep)
    os.truncate(file, file.stat().st_size // 2)
