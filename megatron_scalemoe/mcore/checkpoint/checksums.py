"""What the parameters and their optimizer state were when a checkpoint was saved: one checksum of each tensor, kept in the checkpoint.

Megatron's formats name the tensors of a model, but its distributed optimizer may also keep its state as one flat buffer, and then any
checkpoint with as many numbers loads. So the checksums are taken from the memory of the run that saves, and compared with the memory of
the run that has loaded. They do not depend on the layout of ranks, on which rank an expert is, or on the experts' module: a tensor is
known by its name in the checkpoint, one expert's of one layer by itself, and its checksum is a sum over its elements, to which each rank
adds what it holds.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.mcore.checkpoint.optimizer import optimizer_parts
from megatron_scalemoe.version import SCHEMA_VERSION

CHECKSUMS_KEY = "scalemoe_checksums"  # in the plain part of a checkpoint
WEIGHT = "weight"
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 16  # elements at a time: they stay in the cache
_MODULUS, _NAMED = 1 << 64, 4
_Key = tuple[str, tuple[int, ...], str]  # name, shape, kind


def state_checksums(model_states: Iterable[dict], optimizer: Any) -> str:
    """JSON of `{name: {"shape": [...], kind: checksum}}` of all ranks; the same text on every rank. Collective over all ranks.

    model_states: what `sharded_state_dict` of each model chunk returned, with the parameters themselves as data. optimizer: Megatron's, or
    None for the weights alone. A kind is the name of a tensor, `weight` or as the optimizer calls it (`param` is its fp32 copy of the
    weight), and its dtype. Every weight is taken from its first data-parallel rank.
    """
    sums = _local_checksums(model_states, optimizer)
    keys = list(sums)
    mine = dict(zip(keys, torch.stack([*sums.values()]).tolist(), strict=True)) if sums else {}
    parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    text = [_json(parts) if parts is not None else ""]
    dist.broadcast_object_list(text)
    return text[0]


def check_state(path: Path, saved: str, model_states: Iterable[dict], optimizer: Any) -> int:
    """How many tensors are what they were when the checkpoint at `path` was saved. Collective; call it when all is loaded.

    saved: what `state_checksums` returned then. A tensor is not compared where its shape differs, as that of an embedding padded for other
    tensor parallelism, or its dtype. Raises `ScaleMoEError` with the names of those that differ.
    """
    before, now = json.loads(saved)["tensors"], json.loads(state_checksums(model_states, optimizer))["tensors"]
    same = {
        f"{name} {kind}": before[name][kind] == now[name][kind]
        for name in before.keys() & now.keys()
        if before[name]["shape"] == now[name]["shape"]
        for kind in before[name].keys() & now[name].keys() - {"shape"}
    }
    differing = sorted(name for name, equal in same.items() if not equal)
    if differing:
        raise ScaleMoEError(
            f"{path}: {len(differing)} of {len(same)} tensors are not what they were when it was saved",
            found=", ".join(differing[:_NAMED]) + (f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""),
            try_="an earlier checkpoint (--ckpt-step), or --no-load-optim if no weight is among them",
        )
    return len(same)


def _json(parts: list[dict[_Key, int]]) -> str:
    totals: collections.Counter[_Key] = collections.Counter()
    for part in parts:
        totals.update(part)
    tensors: dict[str, dict] = {}
    for (name, shape, kind), total in sorted(totals.items()):
        tensors.setdefault(name, {"shape": list(shape)})[kind] = f"{total % _MODULUS:016x}"
    return json.dumps({"schema_version": SCHEMA_VERSION, "tensors": tensors})


def _local_checksums(model_states: Iterable[dict], optimizer: Any) -> dict[_Key, Tensor]:
    """This rank's part of each checksum, int64 scalars on the device."""
    sums: dict[_Key, Tensor] = {}
    for state in model_states:
        entries, _ = extract_sharded_tensors_and_factories(state)
        for entry in nested_values(entries):
            if type(entry.data) not in (Tensor, torch.nn.Parameter):
                continue  # a quantized weight of Transformer Engine has no words of its own
            for kind, values_N, start in _tensors(entry, optimizer):
                for piece, first in _pieces(entry):
                    key = (_name(piece), tuple(piece.global_shape[piece.prepend_axis_num :]), f"{kind} {str(values_N.dtype)[6:]}")
                    sums[key] = sums.get(key, 0) + _checksum(piece, first, values_N, start)
    return sums


def _tensors(entry: ShardedBase, optimizer: Any) -> Iterator[tuple[str, Tensor, int]]:
    """(kind, flat values, index of the first one in the flat parameter) of what this rank is the one to count."""
    parameter = entry.data
    in_first_copy = is_main_replica(entry.replica_id)
    if in_first_copy:
        yield WEIGHT, parameter.detach().reshape(-1), 0
    for part in optimizer_parts(optimizer) if optimizer is not None else ():
        if isinstance(part, DistributedOptimizer):
            # each data-parallel rank has its own range of the parameter
            if parameter in part.model_param_group_index_map and is_main_replica(
                (*entry.replica_id[:2], part.distributed_optimizer_instance_id)
            ):
                start = part._get_model_param_range_map(parameter)["param"].start
                values = part._get_main_param_and_optimizer_states(parameter)
                yield from ((kind, value.detach(), start) for kind, value in values.items() if torch.is_tensor(value) and value.dim() == 1)
        elif in_first_copy:
            main = getattr(parameter, "main_param", None)
            state = part.optimizer.state.get(parameter if main is None else main, {})
            values = {"param": main, **state} if state and main is not None else state
            yield from ((kind, value.detach().reshape(-1), 0) for kind, value in values.items() if _is_like(value, parameter))


def _is_like(value: Any, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == parameter.shape


def _pieces(entry: ShardedBase) -> list[tuple[ShardedTensor, int]]:
    """The tensors in the checkpoint that a parameter is, or that it is cut into, each with the index of its first element in it."""
    if not isinstance(entry, ShardedTensorFactory):
        return [(entry, 0)]
    shape_only = torch.empty_like(entry.data, device="meta")
    built = [*nested_values(entry.build_fn(entry.key, shape_only, entry.replica_id, entry.flattened_range))]
    if not all(isinstance(piece, ShardedTensor) and piece.data.is_contiguous() for piece in built):
        return []  # not ranges of the flat parameter: no factory of Megatron's is like that in a GPT
    return [(piece, piece.data.storage_offset()) for piece in built]


def _name(piece: ShardedTensor) -> str:
    """Of one layer's and expert's tensor: the leading axes of a tensor in a checkpoint number them."""
    numbers = piece.global_offset[: piece.prepend_axis_num]
    return f"{piece.key}[{', '.join(map(str, numbers))}]" if numbers else piece.key


def _checksum(piece: ShardedTensor, first: int, values_N: Tensor, start: int) -> Tensor:
    """int64 scalar, modulo 2**64: the sum over the elements of (2 i + 1) * bits, i their index in the whole tensor of the checkpoint.

    piece: the elements from `first` of a flat parameter. values_N: those from `start`, of which some may be in the piece.
    """
    low, high = max(first, start), min(first + math.prod(piece.local_shape), start + values_N.numel())
    total = torch.zeros((), dtype=torch.int64, device=values_N.device)
    if low >= high:  # an expert of the stack of which another rank's optimizer has all
        return total
    words_N, axes = values_N.view(_WORDS[values_N.element_size()]), _cut_axes(piece)
    odd_C = torch.arange(1, 2 * min(_CHUNK, high - low), 2, device=values_N.device)
    for begin in range(low, high, _CHUNK):
        end = min(begin + _CHUNK, high)
        words_C = words_N[begin - start : end - start].long()
        if len(axes) == 1:  # indices that follow each other: (2 i + 1) is 2 of the first one more than in odd_C
            total += (words_C * odd_C[: end - begin]).sum() + 2 * (begin - first) * words_C.sum()
        else:
            index_C = _global_index(axes, torch.arange(begin - first, end - first, device=values_N.device))
            total += ((2 * index_C + 1) * words_C).sum()
    return total


def _global_index(axes: list[tuple[int, int, int]], local_C: Tensor) -> Tensor:
    """Flat indices in the whole tensor of these elements of the piece."""
    stride, index_C = 1, 0
    for size, whole, offset in reversed(axes[1:]):
        index_C += (local_C % size + offset) * stride
        local_C, stride = local_C // size, stride * whole
    return index_C + local_C * stride


def _cut_axes(piece: ShardedTensor) -> list[tuple[int, int, int]]:
    """(size in the piece, in the whole tensor, offset) of each axis; one that is not cut is part of the one before it: most have one."""
    axes = [(1, 1, 0)]
    own = slice(piece.prepend_axis_num, None)
    for size, whole, offset in zip(piece.local_shape, piece.global_shape[own], piece.global_offset[own], strict=True):
        if size == whole:
            axes[-1] = tuple(number * size for number in axes[-1])
        else:
            axes.append((size, whole, offset))
    return axes
