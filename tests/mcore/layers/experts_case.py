"""Experts modules of Megatron and of ours, alone or in an optimised MoE layer, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tests.mcore.megatron_case import LayerCase, initialize, make_layer, transformer_config  # first: it installs the CPU ranks

# isort: split
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.serialization import load_plain_tensors, load_sharded_metadata
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker  # noqa: F401
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.checkpoint.checkpoint import load_checkpoint, save_checkpoint  # noqa: F401
from megatron_scalemoe.mcore.layers.experts import ScaleMoEGroupedMLP

GROUPED = ScaleMoEConfig(experts="grouped")


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


@dataclasses.dataclass(frozen=True)
class LayerTraining:
    """One MoE layer with Megatron's DDP and optimizer, trained to reproduce its input times two."""

    case: LayerCase
    model: torch.nn.Module
    optimizer: object

    def losses(self, steps: int) -> list[float]:
        return [self._step(step) for step in range(steps)]

    def _step(self, step: int) -> float:
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        generator = torch.Generator().manual_seed(1000 * step + torch.distributed.get_rank())
        x = torch.randn(self.case.seq, self.case.batch, 16, generator=generator).to(self.case.dtype)
        y, _ = self.model(x)
        loss = (y.float() - 2 * x.float()).square().mean()
        loss.backward()
        self.model.finish_grad_sync()
        self.optimizer.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        return total.item()


def layer_training(*, grouped: bool, scale: float = 1.0, distributed_optimizer: bool = False, **case_values) -> LayerTraining:
    """Weights depend on the case and on `scale`, which makes them differ from those of another run."""
    case = LayerCase(**case_values, scalemoe=GROUPED if grouped else ScaleMoEConfig())
    layer = make_layer(case, "scalemoe")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(scale)
    bf16 = case.dtype is torch.bfloat16
    if bf16:
        layer = Float16Module(layer.config, layer)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=bf16)
    model = DistributedDataParallel(layer.config, ddp_config, layer)
    options = dict(lr=1e-2, weight_decay=0.01, bf16=bf16, params_dtype=case.dtype, use_distributed_optimizer=distributed_optimizer)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", clip_grad=1.0, **options), [model])
    return LayerTraining(case, model, optimizer)
