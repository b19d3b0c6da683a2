"""Where Megatron's optimizers keep the state of a rank's experts, and which of them a migration can move."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_scalemoe.balance.migrate.state import Parameter
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.optimizer import check_optimizer, optimizer_parts
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP

_UNSUPPORTED = ("use_precision_aware_optimizer", "optimizer_cpu_offload", "overlap_param_gather_with_optimizer_step")


def check_migration_support(optimizer: Any) -> None:
    """Raises `ScaleMoEError` for an optimizer whose state cannot move with the experts; call it at start."""
    check_optimizer(optimizer)
    for part in optimizer_parts(optimizer):
        for option in _UNSUPPORTED:
            if getattr(part.config, option):
                flag = f"--{option.replace('_', '-')}"
                raise ScaleMoEError(f"experts cannot migrate with {flag}", try_=f"leave {flag} out, or keep the placement fixed")


def find_parameters(experts: ScaleMoEGroupedMLP, optimizer: Any) -> tuple[Parameter, ...]:
    """The weights of a module with their optimizer state. Raises `ScaleMoEError` if `optimizer` does not have them."""
    return tuple(_find_parameter(name, getattr(experts, name), optimizer) for name in ("fc1", "fc2"))


def _find_parameter(name: str, weight: Tensor, optimizer: Any) -> Parameter:
    whole = ((0, weight.numel()),)
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for buffer in part.buffers:
                if weight in buffer.param_index_map:
                    main_N = _distributed_main(part, weight)
                    return Parameter(name, weight, main_N, _adam(part, main_N), _shares(buffer, weight), buffer.data_parallel_group)
        else:
            main = getattr(weight, "main_param", weight)
            if any(main is other for group in part.optimizer.param_groups for other in group["params"]):
                return Parameter(name, weight, main.detach().view(-1), _adam(part, main), whole, None)
    raise ScaleMoEError(f"the optimizer has no parameter {name} of these experts", try_="train all experts, or keep the placement fixed")


def _distributed_main(part: DistributedOptimizer, weight: Tensor) -> Tensor | None:
    """What the distributed optimizer updates on this rank: a copy in fp32 for 16-bit weights, a view into fp32 weights."""
    if weight.dtype is not torch.float32:
        return weight.main_param
    for weights, shards in zip(part.model_fp32_groups, part.shard_fp32_groups, strict=True):
        for other, shard in zip(weights, shards, strict=True):
            if other is weight:
                return shard
    return None


def _adam(part: Any, main: Tensor | None) -> dict[str, Tensor]:
    """Adam's tensors for a parameter; not by indexing, which would create them."""
    state = {} if main is None else part.optimizer.state.get(main, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == main.shape}


def _shares(buffer: Any, weight: Tensor) -> tuple[tuple[int, int], ...]:
    """Elements of a weight that each rank updates: a bucket of parameters is cut into equal parts, one for each rank."""
    first, last, bucket_id = buffer.param_index_map[weight]
    bucket, ranks = buffer.buckets[bucket_id], buffer.data_parallel_group.size()
    part = bucket.grad_data.numel() // ranks
    cuts = [min(max(bucket.offset + rank * part, first), last) - first for rank in range(ranks + 1)]
    return tuple(zip(cuts[:-1], cuts[1:], strict=True))
