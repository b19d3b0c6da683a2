"""Reassigning the sequences of each global batch to data-parallel ranks, so that tokens meet their experts where they are.

Exact: an optimizer step sees the same set of sequences, and every rank as many as before, so that loss and gradients are those of the
default order, to rounding. What does change is what Megatron computes from a micro-batch as a whole: `aux_loss` and `global_aux_loss`, and
the tokens that a capacity factor drops. `seq_aux_loss`, z-loss and expert bias do not. Dropout draws other numbers for a sequence.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
import torch.distributed as dist

from megatron_scalemoe.balance.groups import Groups
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.sequences import SCORE_UNIT, assign_sequences
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable
from megatron_scalemoe.traffic.sample_history import SampleHistory

# Of all selections.
LEAST_GAIN = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class BatchLayout:
    """How a global batch is cut. D data-parallel ranks, M micro-batches of `micro_batch_size` sequences on each.

    ep_ranks_DK: int [D, K], the expert-parallel ranks that share each data-parallel rank: K > 1 with tensor parallelism.
    """

    data_parallel_rank: int
    ep_ranks_DK: np.ndarray
    num_micro_batches: int
    micro_batch_size: int

    @property
    def sequences_per_rank(self) -> int:
        return self.num_micro_batches * self.micro_batch_size


def layout_of(groups: Groups, num_micro_batches: int, micro_batch_size: int) -> BatchLayout:
    """The layout that these groups make. Collective over all ranks."""
    gathered: list = [None] * groups.world.size()
    dist.all_gather_object(gathered, (groups.dp.rank(), groups.ep.rank()), group=groups.world)
    ep_ranks = [sorted({ep for dp, ep in gathered if dp == rank}) for rank in range(groups.dp.size())]
    return BatchLayout(groups.dp.rank(), np.array(ep_ranks), num_micro_batches, micro_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementReport:
    """What placing one global batch did. Shares are predicted fractions of selections whose expert has a copy on the sequence's rank."""

    moved_sequences: int
    default_share: float
    placed_share: float
    time_s: float


class SequencePlacement:
    """Decides who computes which sequence. Owns what is known now (`use`) and the group that must agree.

    group: every rank that takes part in loading batches, e.g. all ranks, or those with tensor rank 0: they must all call `place` for every
        global batch. Best a gloo group: over NCCL the call waits for the device.
    owner: true on one rank of each data-parallel rank, the one that speaks for it (tensor, context and pipeline rank 0).
    pays: whether the last global batch gained enough by it.
    report: of the last global batch that was placed; None before the first, and while nothing is known.
    """

    def __init__(self, layout: BatchLayout, *, group: dist.ProcessGroup, owner: bool):
        self.layout, self.group, self.owner = layout, group, owner
        self.report: PlacementReport | None = None
        self._plan: PlacementPlan | None = None
        self._table: AffinityTable | None = None
        self._history: SampleHistory | None = None
        self.pays = True
        on_cuda = "nccl" in dist.get_backend(group)
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")

    def use(self, plan: PlacementPlan, table: AffinityTable, history: SampleHistory | None = None) -> None:
        """From now on places by these; to be called on every rank of the group at the same step, after each replan or sync.

        A sample that `history` has seen (anywhere in the group) is predicted from it, any other one from `table`.
        """
        self._plan, self._table, self._history = plan, table, history
        self._share_RG = table.rank_shares(plan)
        self.pays = True

    def place(self, tokens_NS: np.ndarray | None, ids_N: np.ndarray) -> np.ndarray:
        """int64 [M, micro-batch]: ids of the sequences that this data-parallel rank computes, of the whole global batch.

        ids_N: int [N], this data-parallel rank's sequences in default order, micro-batch after micro-batch. tokens_NS: int [N, S], their
        token ids; read on owners only. Before the first `use`, and from a batch for which placing gained less
            than `LEAST_GAIN` to the next `use`: the default order, at no cost.

        Collective over the group. With pipeline stages: call it before the step's schedule starts. A later stage asks for its data only
        when activations have come, and would never get them from a first stage that waits for it here.
        """
        start_s, layout = time.perf_counter(), self.layout
        assert len(ids_N) == layout.sequences_per_rank
        if self._plan is None or not self.pays or len(layout.ep_ranks_DK) == 1:
            return np.asarray(ids_N).reshape(layout.num_micro_batches, -1)
        ids_B = self._gather_rows(np.asarray(ids_N, dtype=np.int64))
        if not np.array_equal(ids_B.reshape(-1, len(ids_N))[layout.data_parallel_rank], ids_N):
            raise ScaleMoEError(
                "all ranks of a data-parallel rank must have the same sequences by default",
                found=f"other ids on rank {dist.get_rank()}, data-parallel rank {layout.data_parallel_rank}",
                try_="the same data, seed and consumed samples on all ranks",
            )
        score_BG = self._scores(tokens_NS, ids_B)
        cell_B = self._agree(assign_sequences(score_BG, layout.ep_ranks_DK) if dist.get_rank(self.group) == 0 else np.zeros_like(ids_B))
        placed_B = np.empty_like(ids_B)
        placed_B[cell_B] = ids_B
        self._report(score_BG, cell_B, start_s)
        self.pays = self.report.placed_share - self.report.default_share >= LEAST_GAIN
        return placed_B.reshape(-1, layout.num_micro_batches, layout.micro_batch_size)[layout.data_parallel_rank]

    def _scores(self, tokens_NS: np.ndarray | None, ids_B: np.ndarray) -> np.ndarray:
        """float64 [B, G], the same on all ranks: owners score their own sequences, and everybody tells what the history has."""
        score_NG = np.zeros((self.layout.sequences_per_rank, self._plan.num_ranks))
        if self.owner:
            score_NG = self._table.sequence_scores(tokens_NS, self._share_RG)
        score_BG = self._gather_rows(np.rint(score_NG * SCORE_UNIT).astype(np.int64))
        score_BG = score_BG / SCORE_UNIT
        if self._history is not None:
            hosted_BX = self._sum(self._history.hosted(ids_B, self._plan))
            seen_B = hosted_BX[:, 0] > 0
            score_BG[seen_B] = hosted_BX[seen_B, 1:] / hosted_BX[seen_B, :1]
        return score_BG

    def _gather_rows(self, mine_NX: np.ndarray) -> np.ndarray:
        """int64 [B, ...]: the owners' rows in the order of data-parallel ranks."""
        everyone = np.zeros((len(self.layout.ep_ranks_DK), *mine_NX.shape), dtype=np.int64)
        if self.owner:
            everyone[self.layout.data_parallel_rank] = mine_NX
        return self._sum(everyone).reshape(-1, *mine_NX.shape[1:])

    def _sum(self, array: np.ndarray) -> np.ndarray:
        """The sum over the group: of integers, so that every rank gets the very same."""
        tensor = torch.from_numpy(array).to(self._device)
        dist.all_reduce(tensor, group=self.group)
        return tensor.cpu().numpy()

    def _agree(self, cell_B: np.ndarray) -> np.ndarray:
        """The assignment of the group's first rank: two ranks that differ would lose one sequence and compute another one twice."""
        tensor = torch.from_numpy(cell_B).to(self._device)
        dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=self.group)
        return tensor.cpu().numpy()

    def _report(self, score_BG: np.ndarray, cell_B: np.ndarray, start_s: float) -> None:
        share_BD = score_BG[:, self.layout.ep_ranks_DK].mean(axis=2)
        sequence_B, default_B = np.arange(len(cell_B)), np.arange(len(cell_B)) // self.layout.sequences_per_rank
        new_B = cell_B // self.layout.sequences_per_rank
        self.report = PlacementReport(
            moved_sequences=int((new_B != default_B).sum()),
            default_share=float(share_BD[sequence_B, default_B].mean()),
            placed_share=float(share_BD[sequence_B, new_B].mean()),
            time_s=time.perf_counter() - start_s,
        )
