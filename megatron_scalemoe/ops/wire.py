"""Counts the bytes that torch.distributed collectives make leave this rank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class WireMeter(TorchDispatchMode):
    """While active, adds up in `bytes_out` what each collective sends to other ranks, in forward and backward, on any backend.

    An all-to-all sends every row that is not its own rank's; an all-gather sends its input to each other rank, a reduce-scatter each other
    rank's part of it, an all-reduce is both. These are the payloads, not what a ring or tree algorithm does with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes_out = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.bytes_out += _bytes_out(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))


def _bytes_out(name: str, args: tuple) -> int:
    if name == "alltoall_base_":
        _, sent, group, _, input_splits, *_ = args
        group = _group(group)
        rows = sent.shape[0] if sent.dim() else 1
        own = input_splits[group.rank()] if input_splits else rows // group.size()
        return _nbytes(sent) * (rows - own) // max(rows, 1)
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        _, sent, group, *_ = args
        others = _group(group).size() - 1
        return _nbytes(sent) * others if name == "_allgather_base_" else _nbytes(sent) * others // (others + 1)
    if name == "allreduce_":
        tensors, group, *_ = args
        group_size = _group(group).size()
        return 2 * sum(map(_nbytes, tensors)) * (group_size - 1) // group_size
    if name in ("barrier", "monitored_barrier_"):
        return 0
    raise NotImplementedError(f"WireMeter does not know the collective c10d::{name}")


def _group(boxed) -> torch.distributed.ProcessGroup:
    return torch.distributed.ProcessGroup.unbox(boxed)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
