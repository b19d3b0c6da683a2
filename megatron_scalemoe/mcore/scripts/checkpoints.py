"""What ScaleMoE does when Megatron-LM's training program saves and loads a checkpoint. The functions that it puts something in front of:

training.save_checkpoint               the plan goes beside the checkpoint
checkpointing.generate_state_dict      checksums of parameters and optimizer state go into it
training.load_checkpoint               afterwards: is in memory what was saved?
DistributedOptimizer.sharded_param_state_fully_reshardable    several buckets are saved right
checkpointing._load_base_checkpoint    before tensors are read: is the optimizer state in an order that this run can read?
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.checkpoint import checkpoint_groups, named_chunks, sharded_model_state
from megatron_scalemoe.mcore.checkpoint.checksums import CHECKSUMS_KEY, check_state, state_checksums
from megatron_scalemoe.mcore.checkpoint.layout import ExpertOrder, check_optimizer_layout, expert_order
from megatron_scalemoe.mcore.checkpoint.optimizer import ranges_without_padding
from megatron_scalemoe.mcore.scripts import hooks
from megatron_scalemoe.mcore.scripts.session import TrainingSession


class _Loading:
    """One call of `load_checkpoint`, between its beginning and end. reads: the order of this run's experts; None while nothing is loaded.
    optimizer: to load into, if any. path, state: of the checkpoint, without its tensors."""

    def __init__(self) -> None:
        self.reads: ExpertOrder | None = None
        self.optimizer: Any = None
        self.path, self.state = Path(), {}

    def loads_optimizer(self, args: Any) -> bool:
        """As Megatron decides it; a checkpoint without optimizer state says so in its arguments."""
        without = args.finetune or args.no_load_optim or getattr(self.state.get("args"), "no_save_optim", False)
        return self.optimizer is not None and not without

    @property
    def sharding_type(self) -> str | None:
        """Of the distributed optimizer's state in the checkpoint."""
        return (self.state.get("content_metadata") or {}).get("distrib_optim_sharding_type")


def attach(session: TrainingSession) -> None:
    """Put our functions in front of Megatron's, for the training that starts next in this process."""
    from megatron.training import checkpointing, training

    loading = _Loading()
    hooks.attach(training, session, save_checkpoint=_save_checkpoint)
    hooks.attach(training, loading, load_checkpoint=_load_checkpoint)
    hooks.attach(checkpointing, loading, generate_state_dict=_generate_state_dict, _load_base_checkpoint=_load_base_checkpoint)
    save_state = DistributedOptimizer.sharded_param_state_fully_reshardable
    DistributedOptimizer.sharded_param_state_fully_reshardable = functools.partialmethod(_mended, save_state)


def _mended(part: DistributedOptimizer, save_state: Callable, *args: Any, **options: Any) -> dict | None:
    with ranges_without_padding([part]):
        return save_state(part, *args, **options)


def _save_checkpoint(session: TrainingSession, original: Callable, *args: Any, **options: Any) -> None:
    from megatron.training import get_args
    from megatron.training.checkpointing import get_checkpoint_name

    original(*args, **options)
    given = hooks.arguments(original, args, options)
    if not given["non_persistent_ckpt"]:
        session.save_beside(Path(get_checkpoint_name(get_args().save, given["iteration"], return_base_dir=True)))


def _generate_state_dict(loading: _Loading, original: Callable, *args: Any, **options: Any) -> dict:
    state = original(*args, **options)
    given = hooks.arguments(original, args, options)
    if given["iteration"] is not None and given["args"].ckpt_format == "torch_dist":  # without an iteration, it is what shall be loaded
        model_states = [state[name] for name in named_chunks(given["model"])]
        state[CHECKSUMS_KEY] = state_checksums(model_states, None if given["args"].no_save_optim else given["optimizer"])
    return state


def _load_checkpoint(loading: _Loading, original: Callable, *args: Any, **options: Any) -> Any:
    from megatron.training import get_args

    given = hooks.arguments(original, args, options)
    model, optimizer = given["ddp_model"], given["optimizer"]
    loading.reads, loading.optimizer, loading.state = expert_order(model), optimizer, {}
    result = original(*args, **options)
    if CHECKSUMS_KEY in loading.state:
        metadata = {**loading.state["content_metadata"], "dp_cp_group": checkpoint_groups().dp_cp}
        states = sharded_model_state(model, metadata).values()
        loaded = optimizer if loading.loads_optimizer(get_args()) else None
        compared = check_state(loading.path, loading.state[CHECKSUMS_KEY], states, loaded)
        if dist.get_rank() == 0:
            print(f"scalemoe: {compared} tensors of {loading.path} are in memory as they were saved", flush=True)
    loading.reads, loading.optimizer, loading.state = None, None, {}
    return result


def _load_base_checkpoint(loading: _Loading, original: Callable, *args: Any, **options: Any) -> tuple:
    result = original(*args, **options)
    state, name, release, _ = result
    given = hooks.arguments(original, args, options)
    # rank0: the plain part only, so that the caller can say which tensors it wants
    if given["rank0"] and loading.reads is not None and state and not release:
        loading.path, loading.state = Path(name), state
        training_args = given["args"]
        _check_sizes(loading, training_args)
        if training_args.use_distributed_optimizer and loading.loads_optimizer(training_args):
            check_optimizer_layout(loading.path, loading.sharding_type, state.get("args"), loading.reads)
    return result


def _check_sizes(loading: _Loading, args: Any) -> None:
    """Raises `ScaleMoEError` where Megatron would fail over a key that the checkpoint of another number of ranks does not have."""
    saved = loading.state.get("args")
    if saved is None:
        return
    before, now = saved.expert_model_parallel_size, args.expert_model_parallel_size
    problems, flags = [], []
    if loading.loads_optimizer(args):
        if (before > 1) != (now > 1):  # one optimizer, or one for the experts beside it
            problems.append("Megatron cannot read its optimizer state where expert parallelism begins or ends")
            flags.append("--no-load-optim")
        elif before != now and loading.sharding_type == "dp_reshardable":
            problems.append("dp_reshardable is bound to one expert-parallel size: save with --dist-ckpt-optim-fully-reshardable")
            flags.append("--no-load-optim")
    if _loads_rng(args, saved) and _rng_layout(saved) != _rng_layout(args):
        problems.append("it has the random number generators of other ranks")
        flags.append("--no-load-rng")
    if problems:
        raise ScaleMoEError(
            f"{loading.path} was saved with --expert-model-parallel-size {before} and {saved.data_parallel_size} data-parallel ranks",
            found=f"{now} and {args.data_parallel_size}, and " + "; ".join(problems),
            try_=" ".join(flags),
        )


def _loads_rng(args: Any, saved: Any) -> bool:
    same = all(
        getattr(saved, f"{axis}_model_parallel_size") == getattr(args, f"{axis}_model_parallel_size") for axis in ("tensor", "pipeline")
    )
    return same and not (args.finetune or args.no_load_rng or saved.no_save_rng)


def _rng_layout(args: Any) -> int | None:
    """How Megatron numbers the generators' states: by data-parallel rank only with expert parallelism."""
    return args.data_parallel_size * args.context_parallel_size if args.expert_model_parallel_size > 1 else None
