"""All experts of a rank as two stacked weights and two grouped matrix multiplications, without Transformer Engine.

Weights, initialisation, results and checkpoint are those of Megatron's `SequentialMLP`, which computes one expert after the other and waits
for the counts on the host. `megatron` and `grouped` experts load each other's checkpoints, with optimizer state.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedBase, ShardedTensorFactory
from megatron.core.fusions.fused_bias_geglu import weighted_bias_quick_geglu_impl
from megatron.core.fusions.fused_bias_swiglu import weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_scalemoe.balance.replicas import LayerReplicas

Offsets = tuple[tuple[int, int, int], ...]  # (axis, index of this shard, number of shards), as everywhere in Megatron's checkpoints


class ScaleMoEGroupedMLP(MegatronModule):
    """Experts of one rank, in the place of `SequentialMLP`. What it cannot compute is refused by `support.check_supported`.

    home_experts: the logical expert in each of the L home slots; Megatron's own placement until a plan moves them, always in the order of
    the stacked weights. Checkpoints name experts by it. replicas: the copies of other ranks' experts that this rank computes, too, if any;
    replica_time_s: how long it has waited for them. name: Megatron's for this module, not used.
    fc1 [L, F1, D] and fc2 [L, D, F2] in `params_dtype`. F2 is this expert-tensor-parallel rank's part of the FFN size; F1 is the same, or
    twice that with a gated linear unit.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, name: str | None = None):
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.home_experts = self._megatrons_homes()
        self.replicas: LayerReplicas | None = None
        self.replica_time_s = 0.0
        weights = [_initial_weights(config, self.tp_group) for _ in range(num_local_experts)]
        self.fc1, self.fc2 = (torch.nn.Parameter(torch.stack(same_layer)) for same_layer in zip(*weights, strict=True))
        for parameter, tp_axis, stride in ((self.fc1, 1, _fc1_parts(config)), (self.fc2, 2, 1)):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=tp_axis, stride=stride)
            parameter.allreduce = config.expert_model_parallel_size == 1  # False: gradients are averaged over expert-data-parallel ranks

    def _megatrons_homes(self) -> tuple[int, ...]:
        first = self.ep_group.rank() * self.num_local_experts
        return tuple(range(first, first + self.num_local_experts))

    @property
    def in_megatrons_places(self) -> bool:
        """Whether every expert is in the slot that Megatron gives it."""
        return self.home_experts == self._megatrons_homes()

    def set_replicas(self, slots_P: np.ndarray | None) -> None:
        """Compute the replicas that this rank has in these slots (int [P], of one layer), or none. All ranks call it together."""
        self.replicas = None
        if slots_P is not None:
            self.replicas = LayerReplicas(self.fc1, self.fc2, slots_P, self.ep_group, self._count_replica_time)

    def _count_replica_time(self, time_s: float) -> None:
        self.replica_time_s += time_s

    def forward(self, x_RD: Tensor, tokens_per_expert: Tensor, probs_R: Tensor) -> tuple[Tensor, None]:
        """Rows sorted by expert, their counts per expert and probabilities -> outputs [R, D] and no bias.

        tokens_per_expert: int [L], on any device; with replicas int [slots of this rank] on the host, homes first.
        """
        if self.replicas is None:
            return self.compute(x_RD, tokens_per_expert, probs_R, self.fc1, self.fc2), None
        fc1, fc2, copied_fc1, copied_fc2 = self.replicas.with_gradients()
        at_home, copied = tokens_per_expert[: self.num_local_experts], tokens_per_expert[self.num_local_experts :]
        num_rows = int(at_home.sum())
        y_RD = self.compute(x_RD[:num_rows], at_home, probs_R[:num_rows], fc1, fc2)
        if not len(self.replicas.replica_slots):
            return y_RD, None
        of_copies = copied[torch.from_numpy(self.replicas.replica_slots)]
        return torch.cat([y_RD, self.compute(x_RD[num_rows:], of_copies, probs_R[num_rows:], copied_fc1, copied_fc2)]), None

    def compute(self, x_RD: Tensor, tokens_per_expert: Tensor, probs_R: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        """Outputs [R, D] of experts with these stacked weights."""
        offsets_L = tokens_per_expert.to(x_RD.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        probs_R1 = probs_R.unsqueeze(-1)
        if self.config.moe_apply_probs_on_input:
            x_RD, probs_R1 = (probs_R1 * x_RD).to(x_RD.dtype), torch.ones_like(probs_R1)
        hidden_RF = _activate(self.config, _grouped_linear(x_RD, fc1, offsets_L), probs_R1)
        return _grouped_linear(hidden_RF, fc2, offsets_L)

    def get_extra_state(self) -> None:
        """Nothing: it stands for the empty extra states of SequentialMLP's linears, which its checkpoints hold."""

    def set_extra_state(self, state: object) -> None:
        """Ignored, as by Megatron's linears."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict | None = None) -> dict:
        """This module's state under its own names, with the keys, global shapes and replica ids that SequentialMLP writes."""
        singleton = (metadata or {}).get("singleton_local_shards", False)
        state = {f"{prefix}_extra_state": self._extra_states(f"{prefix}experts", sharded_offsets, singleton)}
        for name, tp_axis, parts in (("fc1", 0, _fc1_parts(self.config)), ("fc2", 1, 1)):
            build = functools.partial(self._expert_tensors, sharded_offsets, singleton, tp_axis, parts)
            weight = getattr(self, name)
            merge = functools.partial(_join, weight.shape)
            key, replica_id = f"{prefix}experts.linear_{name}.weight", (0, 0, self.dp_group.rank())
            state[f"{prefix}{name}"] = ShardedTensorFactory(key, weight, build, merge, replica_id)
        return state

    def _experts_in_checkpoint(self, key: str, sharded_offsets: Offsets, singleton: bool) -> list[tuple[str, Offsets]]:
        """Key and offsets of each local expert: a key of its own, or its place on an axis of experts."""
        total = self.ep_group.size() * self.num_local_experts
        if singleton:
            return [(f"{key}.{expert}", sharded_offsets) for expert in self.home_experts]
        return [(key, (*sharded_offsets, (len(sharded_offsets), expert, total))) for expert in self.home_experts]

    def _extra_states(self, key: str, sharded_offsets: Offsets, singleton: bool) -> list[ShardedBase]:
        replica_id = (0, self.tp_group.rank(), self.dp_group.rank())
        return [
            make_sharded_object_for_checkpoint(None, f"{expert_key}.{linear}._extra_state", offsets, replica_id)
            for expert_key, offsets in self._experts_in_checkpoint(key, sharded_offsets, singleton)
            for linear in ("linear_fc1", "linear_fc2")
        ]

    @torch.no_grad()
    def _expert_tensors(
        self,
        sharded_offsets: Offsets,
        singleton: bool,
        tp_axis: int,
        parts: int,
        key: str,
        stacked: Tensor,
        replica_id: ReplicaId,
        flattened_range: None,
    ) -> list[ShardedBase]:
        """The sharded tensors of a stacked weight, or of an optimizer tensor of its shape, expert by expert."""
        head, linear, name = key.rsplit(".", 2)
        groups = dict(tp_group=self.tp_group, dp_cp_group=self.dp_group)
        tensors = []
        for (expert_key, offsets), tensor in zip(self._experts_in_checkpoint(head, sharded_offsets, singleton), stacked, strict=True):
            sharded = make_tp_sharded_tensor_for_checkpoint(
                tensor, f"{expert_key}.{linear}.{name}", tp_axis, replica_id, prepend_offsets=offsets, **groups
            )
            tensors += apply_swiglu_sharded_factory(sharded, offsets, singleton).build() if parts == 2 else [sharded]
        return tensors


def _fc1_parts(config: TransformerConfig) -> int:
    return 2 if config.gated_linear_unit else 1


def _initial_weights(config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Weights of one expert. Megatron's own layers make them, so that they take the same random numbers as in SequentialMLP."""
    common = dict(config=config, bias=False, skip_bias_add=True, is_expert=True, tp_group=tp_group)
    parts, ffn = _fc1_parts(config), config.moe_ffn_hidden_size
    fc1 = ColumnParallelLinear(config.hidden_size, ffn * parts, init_method=config.init_method, gather_output=False, stride=parts, **common)
    fc2 = RowParallelLinear(ffn, config.hidden_size, init_method=config.output_layer_init_method, input_is_parallel=True, **common)
    return fc1.weight.detach(), fc2.weight.detach()


def _grouped_linear(x_RD: Tensor, weight_LFD: Tensor, offsets_L: Tensor) -> Tensor:
    """Rows of expert l, which end at offsets_L[l] (int32), times its weight, transposed: [R, F]."""
    y_RF = F.grouped_mm(x_RD, weight_LFD.transpose(-2, -1), offs=offsets_L)
    if y_RF.requires_grad:
        y_RF.register_hook(torch.Tensor.contiguous)  # the backward refuses an expanded gradient, as that of sum()
    return y_RF


def _activate(config: TransformerConfig, x_RF: Tensor, probs_R1: Tensor) -> Tensor:
    """As in Megatron's MLP: its fused kernels round differently from the plain functions in bf16."""
    if config.bias_activation_fusion:
        fused = weighted_bias_swiglu_impl if config.activation_func is F.silu else weighted_bias_quick_geglu_impl
        return fused(x_RF, None, probs_R1, config.activation_func_fp8_input_store)
    if config.gated_linear_unit:
        gate_RF, linear_RF = x_RF.chunk(2, -1)
        activated_RF = config.activation_func(gate_RF) * linear_RF
    else:
        activated_RF = config.activation_func(x_RF)
    return (activated_RF * probs_R1).to(x_RF.dtype)


def _join(shape: torch.Size, parts: list[Tensor]) -> Tensor:
    """The stacked weight of this shape from the parts that `_expert_tensors` lists."""
    return torch.cat(parts).view(shape)
