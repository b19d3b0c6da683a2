"""What live balance needs of a model and its optimizer, and one MoE layer under a plan. `mcore/live_model.py` has Megatron's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.balance.migrate.state import Parameter
from megatron_scalemoe.balance.replicas import LayerReplicas
from megatron_scalemoe.dispatch.base import RowsSent
from megatron_scalemoe.dispatch.placed import LayerPlacement
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan


@dataclasses.dataclass(frozen=True)
class MoESizes:
    """Of all MoE layers of a model. pads_to_capacity: whether experts compute rows that no token asked for."""

    num_experts: int
    topk: int
    hidden_size: int
    ffn_hidden_size: int
    gated: bool
    dtype: torch.dtype
    pads_to_capacity: bool


class Experts(Protocol):
    """The experts that a rank computes: homes, stacked in two weights, and replicas. Described in `mcore/layers/experts.py`."""

    fc1: torch.nn.Parameter
    fc2: torch.nn.Parameter
    num_local_experts: int
    home_experts: tuple[int, ...]
    ep_group: torch.distributed.ProcessGroup
    replicas: LayerReplicas | None
    replica_time_s: float

    def set_replicas(self, slots_P: np.ndarray | None) -> None: ...
    def compute(self, x_RD: Tensor, tokens_per_expert: Tensor, probs_R: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor: ...


class Router(Protocol):
    """tokens_per_expert: int64 [E] on the device, of this rank since the start."""

    tokens_per_expert: Tensor


class TokenDispatcher(Protocol):
    """Counts since the start. rows_computed: by this rank's experts. rows_sent: only while `counts_sent`. selections: (token, expert) pairs
    that its router should have made."""

    rows_computed: int | Tensor
    rows_sent: RowsSent
    counts_sent: bool
    selections: int

    def set_placement(self, placement: LayerPlacement | None) -> None: ...


class MoELayer(Protocol):
    router: Router
    experts: Experts
    token_dispatcher: TokenDispatcher

    def count_tokens(self, on: bool) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class LiveLayer:
    """One of this rank's MoE layers. row: its row in plans of the whole model. index: its row in the plan of this pipeline stage."""

    row: int
    index: int
    layer: MoELayer

    @property
    def experts(self) -> Experts:
        return self.layer.experts

    @property
    def replicas(self) -> LayerReplicas | None:
        """None also with other experts than ours."""
        return getattr(self.experts, "replicas", None)

    @property
    def replica_time_s(self) -> float:
        """How long this rank has waited for replicas."""
        return getattr(self.experts, "replica_time_s", 0.0)

    def apply(self, plan: PlacementPlan, node_of_rank_G: np.ndarray) -> None:
        """Dispatch by this plan of the stage from now on, and make its replicas. The homes must be in place."""
        experts, slots_P = self.experts, plan.physical_to_logical[self.index]
        ranks, homes = plan.num_ranks, experts.num_local_experts
        first = experts.ep_group.rank() * plan.slots_per_rank
        assert experts.home_experts == tuple(slots_P[first : first + homes]), "homes must have moved before"
        has_replicas = (slots_P != EMPTY).sum() > plan.num_logical_experts
        if not has_replicas:
            slots_P = slots_P.reshape(ranks, -1)[:, :homes].reshape(-1)  # no empty slots, no counts to gather
        contiguous = not has_replicas and (slots_P == np.arange(plan.num_logical_experts)).all()
        self.layer.token_dispatcher.set_placement(None if contiguous else LayerPlacement(slots_P, ranks, node_of_rank_G))
        experts.set_replicas(slots_P if has_replicas else None)


class LiveModel(Protocol):
    """layers: this rank's. layer_numbers: of all MoE layers of the model, from 1, in the order of the rows of its plans."""

    groups: Groups
    sizes: MoESizes
    layers: list[LiveLayer]
    layer_numbers: list[int]

    def prepare_for_plans(self) -> None:
        """Let the gradients of replicas come home before they are reduced. Raises `ScaleMoEError` if plans cannot change here."""

    def watch_passes(self, begin: Callable[[], None], stepped: Callable[[], None]) -> None:
        """Call `begin` when the gradients of a step are set to 0, before its first micro-batch, and `stepped` after each optimizer step.

        A step may be repeated, or dropped without an optimizer step: only these two calls tell.
        """

    def parameters_of(self, experts: Experts) -> tuple[Parameter, ...]:
        """The weights of these experts with their optimizer state. Raises `ScaleMoEError` if the optimizer does not have them."""

    def language_model(self) -> tuple[torch.nn.Module, int]:
        """The module that is called with `input_ids`, and the size of its vocabulary. Raises `ScaleMoEError` if there are several."""
