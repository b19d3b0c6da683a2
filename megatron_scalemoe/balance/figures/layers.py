"""Figures of each MoE layer of the whole model, for logs: gathered from all ranks in one collective."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.balance.live import LiveBalance
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One layer since the last `gather`. None: not known with this dispatcher or these flags.

    layer: Megatron's number, from 1. max_over_mean: of the rows that ranks computed, all steps together. sent_bytes: that a rank sent to
    others per step, mean over ranks, in the forward's dispatch and combine, without metadata. local_share: of the rows dispatched, those
    that stayed on their rank. drop_rate: of the (token, expert) selections, those beyond a capacity factor. replicas: in the plan now.
    homes_moved: experts that changed rank.
    """

    layer: int
    max_over_mean: float
    sent_bytes: float | None
    local_share: float | None
    drop_rate: float | None
    replicas: int
    homes_moved: int


class LayerMeter:
    """Remembers what `live`'s layers had counted at the last `gather`. Make it on all ranks at the same step."""

    def __init__(self, live: LiveBalance, config: TransformerConfig):
        self._live, self._steps = live, 0
        self._row_bytes = config.hidden_size * config.params_dtype.itemsize
        # padding to capacity computes rows that no token asked for
        self._counts_drops = not config.moe_pad_expert_input_to_capacity
        self._plan, self._before_LX = live.plan, self._counted()

    def end_step(self) -> None:
        """Call at the end of each step."""
        self._steps += 1

    def gather(self) -> list[LayerFigures]:
        """Of all layers of the model, in order, since the last call. Collective over all ranks; one host synchronisation."""
        counted_LX = self._counted()
        shared_LX = torch.from_numpy(counted_LX - self._before_LX + self._placement_columns()).to(torch.cuda.current_device())
        dist.all_reduce(shared_LX)
        figures = [self._figures(number, row_X) for number, row_X in zip(self._live.layer_numbers, shared_LX.tolist(), strict=True)]
        self._plan, self._before_LX, self._steps = self._live.plan, counted_LX, 0
        return figures

    def _counted(self) -> np.ndarray:
        """int64 [L, X] of this rank, L layers of the whole model: rows computed [G], in the column of the rank; stayed, left, selections,
        kept; and two columns for the placement."""
        ranks, rank = parallel_state.get_expert_model_parallel_world_size(), parallel_state.get_expert_model_parallel_rank()
        counted_LX = np.zeros((len(self._live.layer_numbers), ranks + 6), dtype=np.int64)
        for live in self._live.layers:
            dispatcher = live.layer.token_dispatcher
            counted_LX[live.row, rank] = int(dispatcher.rows_computed)
            counted_LX[live.row, ranks:-2] = [int(count) for count in dataclasses.astuple(dispatcher.traffic)]
        return counted_LX

    def _placement_columns(self) -> np.ndarray:
        """int64 [L, X]: replicas in the plan, and homes moved since the last call, on the first rank of each pipeline stage."""
        columns_LX = np.zeros_like(self._before_LX)
        stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        plan = self._live.plan
        if stage.rank() == 0 and plan is not None:
            for live in self._live.layers:
                replicas = (plan.physical_to_logical[live.index] != EMPTY).sum() - plan.num_logical_experts
                columns_LX[live.row, -2:] = replicas, _homes_moved(self._plan, plan, live.index)
        return columns_LX

    def _figures(self, number: int, row_X: list[int]) -> LayerFigures:
        *load_G, stayed, left, selections, kept, replicas, homes_moved = row_X
        kept /= parallel_state.get_expert_tensor_parallel_world_size()  # each of these ranks computes its part of every row
        sent, ranks = stayed + left, dist.get_world_size() / parallel_state.get_pipeline_model_parallel_world_size()
        return LayerFigures(
            layer=number,
            max_over_mean=max(load_G) * len(load_G) / sum(load_G) if sum(load_G) else 1.0,
            sent_bytes=2 * left * self._row_bytes / ranks / max(self._steps, 1) if sent else None,
            local_share=stayed / sent if sent else None,
            drop_rate=max(0.0, 1 - kept / selections) if selections and self._counts_drops else None,
            replicas=replicas,
            homes_moved=homes_moved,
        )


def _homes_moved(before: PlacementPlan, now: PlacementPlan, layer: int) -> int:
    return int((before.home[layer] // before.slots_per_rank != now.home[layer] // now.slots_per_rank).sum())
