"""Sequence placement in a live run: learns which experts tokens choose, and tells `SequencePlacement`, with the plan in force."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_scalemoe.balance.layers import LiveLayer
from megatron_scalemoe.balance.sequences.affinity import AffinityLearner
from megatron_scalemoe.balance.sequences.sampler import BatchLayout, SequencePlacement, megatron_layout
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable, stacked_hosts
from megatron_scalemoe.traffic.sample_history import SampleHistory

# Of what was learnt before, at each update: routing drifts.
_KEEP = 0.5


class LiveSequences:
    """Owns the learner, its table and the history of samples. plan: of the whole model. by_history: whether samples are remembered."""

    def __init__(
        self,
        model_chunks: list[torch.nn.Module],
        layers: list[LiveLayer],
        config: TransformerConfig,
        plan: PlacementPlan,
        *,
        by_history: bool,
        micro_batches: int,
        micro_batch_size: int | None,
    ):
        if micro_batch_size is None or len(model_chunks) > 1:
            problem = "--scalemoe-sequence-placement needs the micro-batch size, and a pipeline that is not interleaved"
            raise ScaleMoEError(problem, found=f"micro-batch size {micro_batch_size}, {len(model_chunks)} model chunks")
        model = unwrap_model(model_chunks)[0]
        owner = parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.get_pipeline_model_parallel_rank() == 0
        owner = owner and parallel_state.get_context_parallel_rank() == 0
        self.placement = SequencePlacement(megatron_layout(micro_batches, micro_batch_size), group=dist.group.WORLD, owner=owner)
        self._table = AffinityTable.empty(model.vocab_size, plan.num_layers, config.num_moe_experts, config.moe_router_topk)
        self._learner = AffinityLearner(model, {live.row: live.layer.router for live in layers}, self._table)
        self._history = SampleHistory(plan.num_layers, config.num_moe_experts) if by_history else None
        self._learner.set_plan(plan)
        self._plan, self._iteration = plan, 0

    @property
    def layout(self) -> BatchLayout:
        return self.placement.layout

    @property
    def owner(self) -> bool:
        return self.placement.owner

    def start_step(self, iteration: int) -> None:
        """Call before each training step."""
        self._iteration = iteration
        self._learner.start_step(iteration)

    def skip_pass(self) -> None:
        """Call before the forward passes of a step are repeated: their tokens have been seen."""
        self._learner.skip_pass()

    def place(self, tokens_NS: np.ndarray, ids_N: np.ndarray) -> np.ndarray:
        """As `SequencePlacement.place`. To be called once before each training step, not ahead: the ids are those of the step's choices."""
        placed = self.placement.place(tokens_NS, ids_N)
        if self._history is not None:
            self._learner.start_step(self._iteration, placed)
        return placed

    def update(self, plan: PlacementPlan) -> dict:
        """Place by what was learnt until now, and by this plan of the whole model. Figures since the last update. Collective over all.

        local_share: of the selections, as measured. uniform_share: what sequences at random would have.
        """
        report = self.placement.report
        figures = {"local_share": self._learner.measured_share(dist.group.WORLD)}
        if report is not None:
            figures |= {"moved_sequences": report.moved_sequences, "placing_ms": report.time_s * 1e3, "pays": self.placement.pays}
            figures |= {"default_share": report.default_share, "placed_share": report.placed_share}
        if self._history is not None:
            self._learner.record_samples(self._history)
        self._table = self._learner.sync(self._table, dist.group.WORLD, keep=_KEEP)
        figures["uniform_share"] = _uniform_share(self._table, self._plan)
        self._use(plan)
        return figures

    def follow(self, plan: PlacementPlan) -> None:
        """Place by this new plan from now on. Collective over all ranks."""
        self._learner.measured_share(dist.group.WORLD)  # what was counted until here belongs to the old plan
        self._use(plan)

    def _use(self, plan: PlacementPlan) -> None:
        self._plan = plan
        self._learner.set_plan(plan)
        self.placement.use(plan, self._table, self._history)

    def close(self) -> None:
        self._learner.close()


def _uniform_share(table: AffinityTable, plan: PlacementPlan) -> float:
    """Share of the selections learnt whose expert has a copy on a rank, mean over the ranks."""
    counts_LE = table.counts.sum(axis=0, dtype="float64")
    hosted = float((counts_LE[:, :, None] * stacked_hosts(plan)).sum())
    return hosted / max(float(counts_LE.sum()), 1e-300) / plan.num_ranks
