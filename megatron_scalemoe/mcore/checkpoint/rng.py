"""Random number generator states in Megatron's checkpoint format, so that a resumed run draws the numbers that it would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection


def sharded_rng_state(groups: ProcessGroupCollection) -> ShardedObject:
    """This rank's generator states under stock Megatron's key and sharding.

    With expert parallelism there is one entry per (PP, TP, DP) rank. Without, Megatron has one per (PP, TP) rank, which holds a list over
    the data-parallel ranks; stock Megatron then reads its first item unless `--data-parallel-random-init` is on. A collective call.
    """
    pp, tp, dp = groups.pp, groups.tp, groups.dp_cp
    if groups.ep.size() > 1:
        return ShardedObject("rng_state", [_rng_state()], (pp.size(), tp.size(), dp.size()), (pp.rank(), tp.rank(), dp.rank()))
    states: list[Any] = [None] * dp.size()
    torch.distributed.all_gather_object(states, _rng_state(), group=dp)
    return ShardedObject("rng_state", states, (pp.size(), tp.size()), (pp.rank(), tp.rank()), replica_id=dp.rank())


def restore_rng_state(states: list[dict], dp: torch.distributed.ProcessGroup) -> bool:
    """Restore what `sharded_rng_state` saved; False if it was saved at another data-parallel size, where there is nothing to continue."""
    if len(states) not in (1, dp.size()):
        return False
    state = states[dp.rank() if len(states) == dp.size() else 0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tracker = tensor_parallel.get_cuda_rng_tracker()
    graphable = tensor_parallel.is_graph_safe_cuda_rng_tracker(tracker)
    tracker.set_states(_converted(state["rng_tracker_states"], to_graphable=graphable))
    return True


def _rng_state() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": _converted(tensor_parallel.get_cuda_rng_tracker().get_states(), to_graphable=False),
    }


def _converted(states: dict[str, Any], to_graphable: bool) -> dict[str, Any]:
    """Tracker states as tensors, or as the generators that Transformer Engine's tracker keeps for CUDA graphs."""
    return {name: tensor_parallel.convert_cuda_rng_state(state, to_graphable) for name, state in states.items()}
