"""Experts modules of Megatron and of ours, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

import dataclasses

from tests.mcore.megatron_case import LayerCase, initialize, transformer_config  # first: it installs the CPU ranks

# isort: split
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.tensor_parallel import get_cuda_rng_tracker  # noqa: F401
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP


def make_experts(case: LayerCase, kind: str) -> torch.nn.Module:
    """`sequential` or `grouped` experts of this rank, from the same seed."""
    initialize(case.tp, case.ep, case.expert_tp)
    config, groups = transformer_config(case, "alltoall"), get_default_pg_collection()
    if kind == "grouped":
        return ScaleMoEGroupedMLP(case.experts // case.ep, config, groups)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return SequentialMLP(case.experts // case.ep, config, linears, groups)


def stacked(experts: torch.nn.Module, of=lambda parameter: parameter) -> dict[str, torch.Tensor]:
    """A property of every weight, e.g. its gradient, with the experts stacked, whatever the module."""
    if isinstance(experts, ScaleMoEGroupedMLP):
        return {"fc1": of(experts.fc1), "fc2": of(experts.fc2)}
    return {
        "fc1": torch.stack([of(expert.linear_fc1.weight) for expert in experts.local_experts]),
        "fc2": torch.stack([of(expert.linear_fc2.weight) for expert in experts.local_experts]),
    }


def run_experts(experts: torch.nn.Module, counts: list[int]) -> dict[str, torch.Tensor]:
    """Output and every gradient for rows that depend on the counts only."""
    config, rows = experts.config, sum(counts)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, config.hidden_size, generator=generator).to(config.params_dtype).requires_grad_()
    probs = torch.rand(rows, generator=generator).requires_grad_()
    y, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None and y.dtype == config.params_dtype
    (y * torch.linspace(0.5, 1.5, config.hidden_size).to(y.dtype)).sum().backward()
    gradients = stacked(experts, lambda parameter: parameter.grad)
    assert all(gradient.is_contiguous() for gradient in gradients.values())
    return {"y": y.detach(), "x": x.grad, "probs": probs.grad, **gradients}


def sharded_entries(experts: torch.nn.Module, sharded_offsets: tuple, metadata: dict) -> dict:
    """{place in the checkpoint: (everything that describes the entry, its tensor)} of all sharded tensors and objects."""
    state = experts.sharded_state_dict("layer.experts.", sharded_offsets, metadata)
    apply_factories(state)
    entries = {}
    for entry in nested_values(state):
        fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry) if field.name != "data"}
        entries[entry.key, entry.global_offset] = (fields, entry.data)
    return entries
