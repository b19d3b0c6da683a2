"""Optimizer state between Megatron's optimizers and a checkpoint, at any expert-parallel size.

`get_megatron_optimizer` makes one optimizer at EP 1 and two, dense and expert, above; the plain values of a checkpoint (parameter groups,
step, loss scale) are nested accordingly, and the library loads them into the same nesting only. The tensors are found by key, whatever the
nesting. So each optimizer's tensors are loaded by key, and its plain values are looked up by what identifies a parameter group.

Saving is the library's own `optimizer.sharded_state_dict`, mended by `ranges_without_padding`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import megatron.core
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, param_group_identifier_keys

from megatron_scalemoe.errors import ScaleMoEError

FULLY_RESHARDABLE = "fully_reshardable"
_PARAMETER_STATE_LOADERS = {
    FULLY_RESHARDABLE: DistributedOptimizer.load_parameter_state_from_fully_reshardable,
    "dp_reshardable": DistributedOptimizer.load_parameter_state_from_dp_reshardable,
    "fully_sharded_model_space": DistributedOptimizer.load_parameter_state_from_fs_model_space,
}


def optimizer_parts(optimizer: Any) -> list[Any]:
    """The optimizers inside a Megatron optimizer that have parameters on this rank: dense, then expert."""
    return [part for part in getattr(optimizer, "chained_optimizers", [optimizer]) if not part.is_stub_optimizer]


def is_distributed(optimizer: Any) -> bool:
    """Whether this is Megatron's distributed optimizer."""
    return any(isinstance(part, DistributedOptimizer) for part in optimizer_parts(optimizer))


def check_optimizer(optimizer: Any) -> None:
    """Raises `ScaleMoEError` for an optimizer whose state Megatron-Core cannot save or load."""
    for part in optimizer_parts(optimizer):
        inner = part.optimizer
        if type(part) not in (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer) or isinstance(inner, torch.optim.SGD):
            raise ScaleMoEError(
                "checkpoints support Adam, plain or as the distributed optimizer",
                found=f"{type(part).__name__} over {type(inner).__name__}",
                try_="--optimizer adam",
            )
        if type(part) is DistributedOptimizer and part.ddp_config.use_megatron_fsdp:
            raise ScaleMoEError("checkpoints do not support Megatron FSDP", try_="leave --use-megatron-fsdp out")
        if type(part) is DistributedOptimizer and not any(group["params"] for group in inner.param_groups):
            raise ScaleMoEError(
                "without Transformer Engine or Apex the distributed optimizer cannot be saved by a rank whose share holds no parameter",
                try_="leave --use-distributed-optimizer out, or use fewer pipeline or data-parallel ranks",
            )


def prepare_optimizer_state(optimizer: Any) -> None:
    """Give torch's Adam the state of step 0 where it has none, which is before its first step.

    Without it a checkpoint of iteration 0 lacks keys that loading wants, and the distributed optimizer's `sharded_state_dict` fails.
    """
    for part in optimizer_parts(optimizer):
        if not isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            continue  # Transformer Engine's and Apex's Adam keep one step per group
        for parameter in _parameters(part):
            state = part.optimizer.state[parameter]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))


@contextlib.contextmanager
def ranges_without_padding(parts: Iterable[Any]) -> Iterator[None]:
    """Inside, distributed optimizers can save `fully_reshardable` state that lies in several buckets.

    Megatron-Core 0.16 joins the buckets without the padding at their ends, and then cuts each parameter's state out where it would be with
    it (https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/optimizer/distrib_optimizer.py#L1501): all behind the first
    padding would be saved as something else.
    """
    with contextlib.ExitStack() as stack:
        for part in parts if megatron.core.__version__.startswith("0.16.") else ():
            for buffer in part.buffers if type(part) is DistributedOptimizer else ():
                stack.callback(setattr, buffer, "param_index_map", buffer.param_index_map)
                joined = itertools.accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0)
                padding = [bucket.offset - before for bucket, before in zip(buffer.buckets, joined, strict=False)]
                buffer.param_index_map = {
                    parameter: (start - padding[index], end - padding[index], index)
                    for parameter, (start, end, index) in buffer.param_index_map.items()
                }
        yield


def sharded_optimizer_state(optimizer: Any, model_state: dict, metadata: dict, available: set[str]) -> dict[int, dict]:
    """What to read for each optimizer part, `{part index: sharded state dict}`, under the keys that the checkpoint has, `available`."""
    parts = {}
    for index, part in enumerate(optimizer_parts(optimizer)):
        parts[index] = part.sharded_state_dict(model_state, is_loading=True, metadata=metadata)
        dict_list_map_inplace(lambda value, index=index: _with_stored_key(value, index, available), parts[index])
    return parts


def load_optimizer_state(optimizer: Any, loaded: dict[int, dict], saved: Any, metadata: dict) -> None:
    """Give each optimizer part its `loaded` tensors, and the plain values from `saved`, the optimizer entry of the checkpoint's plain part.

    Raises `ScaleMoEError` if the checkpoint lacks a parameter group that this optimizer has.
    """
    for index, part in enumerate(optimizer_parts(optimizer)):
        state = loaded.get(index, {})
        for scaler in _find(saved, "grad_scaler"):
            state["grad_scaler"] = scaler
        if type(part) is DistributedOptimizer:
            if "optimizer" not in state:  # formats that are bound to one layout carry the groups with the tensors
                state["optimizer"] = {"param_groups": _regroup(part, saved)}
            load_distributed(part, state, metadata.get("distrib_optim_sharding_type", "fully_sharded_model_space"))
        else:
            inner = state.setdefault("optimizer", {}) if type(part) is Float16OptimizerWithFloat16Params else state
            inner["param_groups"] = _regroup(part, saved)
            inner.setdefault("state", {})["common_step"] = next(_find(saved, "common_step"), torch.tensor(0.0))
            part.load_state_dict(state)


def load_distributed(part: DistributedOptimizer, state: dict, sharding_type: str) -> None:
    """`part.load_state_dict(state)`, made to work with torch's Adam.

    The library gives all parameters one step tensor, which the next step would increase once per parameter, and then looks for the step
    among the loaded tensors, where it is not. So it loads the rest while the steps are out of its sight.
    """
    if distrib_optimizer.HAVE_APEX_OR_TE:
        part.load_state_dict({**state, "param_state_sharding_type": sharding_type})
        return
    tensors = state.pop("param_state")
    part.load_state_dict(state)
    adam_state = part.optimizer.state
    steps = {parameter: adam_state[parameter].pop("step") for parameter in _parameters(part)}
    with torch.no_grad():  # in fp32 the optimizer's parameters are views of the model's
        _PARAMETER_STATE_LOADERS[sharding_type](part, tensors)
    for parameter, step in steps.items():
        adam_state[parameter]["step"] = step.clone()


def _regroup(part: Any, saved: Any) -> list[dict]:
    """The saved values of each parameter group of `part`, which is the group of the same identity.

    At EP 1 Megatron has no expert groups: there, expert parameters are in the dense group of otherwise the same identity.
    """
    by_identity = {_identity(group): group for groups in _find(saved, "param_groups") for group in groups}
    regrouped = []
    for group in part.optimizer.state_dict()["param_groups"]:
        found = by_identity.get(_identity(group)) or by_identity.get(_identity(group, is_expert_parallel=not group["is_expert_parallel"]))
        if found is None:
            raise ScaleMoEError(
                "the checkpoint has no optimizer state for a parameter group of this model",
                found=f"saved groups {sorted(map(str, by_identity))}, wanted {_identity(group)} as {param_group_identifier_keys}",
                try_="load the weights only (--no-load-optim)",
            )
        regrouped.append({**found, "is_expert_parallel": group["is_expert_parallel"], "params": group["params"]})
    return regrouped


def _identity(group: dict, **changes: bool) -> tuple:
    """What tells this group from others. Megatron-Core 0.19 names keys, too, that only groups with overridden values have."""
    return tuple({**group, **changes}.get(key) for key in param_group_identifier_keys)


def _with_stored_key(value: Any, index: int, available: set[str]) -> Any:
    """A sharded entry of part `index` under the key that the checkpoint has for it.

    Megatron-Core before 0.14, and since then formats bound to one layout, put `chained_<part>.` before the keys where there are two parts.
    """
    if isinstance(value, ShardedBase) and value.key not in available:
        indices = [index] if value.key.startswith("optimizer.distributed.") else [index, 1 - index]
        stored = [f"chained_{i}.{value.key}" for i in indices]
        value.key = next((key for key in stored if key in available), value.key)
    return value


def _find(nested: Any, key: str) -> Iterator[Any]:
    """Every value of `key` in nested dictionaries."""
    if isinstance(nested, dict):
        for name, value in nested.items():
            if name == key:
                yield value
            else:
                yield from _find(value, key)


def _parameters(part: Any) -> list[torch.Tensor]:
    return [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
