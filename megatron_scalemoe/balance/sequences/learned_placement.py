"""Sequence placement in a live run, by what the model itself teaches about its experts, and by the plan in force."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.balance.model import LiveModel
from megatron_scalemoe.balance.sequences.learner import AffinityLearner
from megatron_scalemoe.balance.sequences.sequence_placement import SequencePlacement, layout_of
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable, stacked_hosts
from megatron_scalemoe.traffic.sample_history import SampleHistory

# Of what was learnt before, at each update: routing drifts.
_KEEP = 0.5


class LearnedPlacement(SequencePlacement):
    """Owns the learner, its table and the history of samples. plan: of the whole model. by_history: whether samples are remembered."""

    def __init__(self, model: LiveModel, plan: PlacementPlan, *, by_history: bool, micro_batches: int, micro_batch_size: int | None):
        if micro_batch_size is None:
            raise ScaleMoEError("--scalemoe-sequence-placement needs the micro-batch size", found=micro_batch_size)
        groups, sizes = model.groups, model.sizes
        language_model, vocabulary = model.language_model()
        super().__init__(layout_of(groups, micro_batches, micro_batch_size), group=groups.world, owner=groups.speaks_for_data)
        self._learnt = AffinityTable.empty(vocabulary, plan.num_layers, sizes.num_experts, sizes.topk)
        self._learner = AffinityLearner(language_model, {live.row: live.layer.router for live in model.layers}, self._learnt, groups)
        self._seen = SampleHistory(plan.num_layers, sizes.num_experts) if by_history else None
        self._learner.set_plan(plan)
        self._in_force, self._iteration = plan, 0

    def start_step(self, iteration: int) -> None:
        """Call before each training step."""
        self._iteration = iteration
        self._learner.start_step(iteration)

    def skip_pass(self) -> None:
        """Call before the forward passes of a step are repeated: their tokens have been seen."""
        self._learner.skip_pass()

    def place(self, tokens_NS: np.ndarray | None, ids_N: np.ndarray) -> np.ndarray:
        """As `SequencePlacement.place`. To be called once before each training step, not ahead: the ids are those of the step's choices."""
        placed = super().place(tokens_NS, ids_N)
        if self._seen is not None:
            self._learner.start_step(self._iteration, placed)
        return placed

    def update(self, plan: PlacementPlan) -> dict:
        """Place by what was learnt until now, and by this plan of the whole model. Figures since the last update. Collective over all.

        local_share: of the selections, as measured. uniform_share: what sequences at random would have.
        """
        figures = {"local_share": self._learner.measured_share()}
        if (report := self.report) is not None:
            figures |= {"moved_sequences": report.moved_sequences, "placing_ms": report.time_s * 1e3, "pays": self.pays}
            figures |= {"default_share": report.default_share, "placed_share": report.placed_share}
        if self._seen is not None:
            self._learner.record_samples(self._seen)
        self._learnt = self._learner.sync(self._learnt, keep=_KEEP)
        figures["uniform_share"] = _uniform_share(self._learnt, self._in_force)
        self._follow(plan)
        return figures

    def follow(self, plan: PlacementPlan) -> None:
        """Place by this new plan from now on. Collective over all ranks."""
        self._learner.measured_share()  # what was counted until here belongs to the old plan
        self._follow(plan)

    def _follow(self, plan: PlacementPlan) -> None:
        self._in_force = plan
        self._learner.set_plan(plan)
        self.use(plan, self._learnt, self._seen)


def _uniform_share(table: AffinityTable, plan: PlacementPlan) -> float:
    """Share of the selections learnt whose expert has a copy on a rank, mean over the ranks."""
    counts_LE = table.counts.sum(axis=0, dtype="float64")
    hosted = float((counts_LE[:, :, None] * stacked_hosts(plan)).sum())
    return hosted / max(float(counts_LE.sum()), 1e-300) / plan.num_ranks
