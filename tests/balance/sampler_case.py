"""Sequence placement with a real model, inside a pool rank. Imported by pool workers only."""

from __future__ import annotations

from unittest import mock

from tests.mcore import tiny_gpt  # first: it installs the CPU ranks
from tests.mcore.tiny_gpt import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Setup, Training

# isort: split
import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter

from megatron_scalemoe.balance.sequences.learner import AffinityLearner
from megatron_scalemoe.balance.sequences.sequence_placement import SequencePlacement, layout_of
from megatron_scalemoe.mcore.live_model import megatron_groups
from megatron_scalemoe.placement.sequences import cluster_sequences
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable
from megatron_scalemoe.traffic.sample_history import SampleHistory

LAYERS, TOPICS = 2, 2


def topical_batch(step: int) -> torch.Tensor:
    """[GLOBAL_BATCH, SEQUENCE + 1] tokens: each sequence of one topic's half of the vocabulary, topics in random order."""
    generator = torch.Generator().manual_seed(step)
    topic = torch.randperm(GLOBAL_BATCH, generator=generator)[:, None] % TOPICS
    words = VOCABULARY // TOPICS
    return topic * words + torch.randint(words, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)


class LearningTraining(Training):
    """A training whose data may be placed, and which learns on every step."""

    def __init__(self, setup: Setup, *, rows: int = VOCABULARY):
        super().__init__(setup)
        groups = megatron_groups()
        self.layout = layout_of(groups, 2, GLOBAL_BATCH // parallel_state.get_data_parallel_world_size() // 2)
        self.placement = SequencePlacement(self.layout, group=dist.group.WORLD, owner=groups.speaks_for_data)
        self.table = AffinityTable.empty(VOCABULARY, LAYERS, setup.experts, 2, max_rows=rows)
        self.history = SampleHistory(LAYERS, setup.experts)
        gpt = next(module for module in self.model.modules() if isinstance(module, GPTModel))
        routers = [module for module in gpt.modules() if isinstance(module, TopKRouter)]
        self.learner = AffinityLearner(gpt, {router.layer_number - 1: router for router in routers}, self.table, groups, interval=1)
        self.seen_ids, self.routed = [], [[] for _ in routers]
        gpt.register_forward_pre_hook(lambda _, args: self.seen_ids.append(args[0]))
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda _, __, output, layer=layer: self.routed[layer].append(output[1]))

    def losses(self, steps: int) -> list[float]:
        with mock.patch.object(tiny_gpt, "_micro_batches", self._micro_batches):
            return super().losses(steps)

    def _micro_batches(self, step: int, *_):
        tokens, layout = topical_batch(step), self.layout
        ids_N = step * GLOBAL_BATCH + np.arange(GLOBAL_BATCH).reshape(-1, layout.sequences_per_rank)[layout.data_parallel_rank]
        ids_MB = self.placement.place(tokens[ids_N % GLOBAL_BATCH].numpy(), ids_N)
        self.learner.start_step(step, ids_MB)
        return iter([tokens[torch.from_numpy(ids_B % GLOBAL_BATCH)] for ids_B in ids_MB])

    def sync(self) -> AffinityTable:
        self.table = self.learner.sync(self.table, keep=1.0)
        return self.table


def learnt_counts(setup: Setup) -> dict[str, np.ndarray]:
    """What two steps taught the table, and how often each token id was there."""
    training = LearningTraining(setup)
    training.losses(2)
    histogram = torch.cat([topical_batch(step)[:, :-1].reshape(-1) for step in range(2)]).bincount(minlength=VOCABULARY)
    return {"learnt": training.sync().counts, "again": training.sync().counts, "histogram": histogram.numpy()}


def learnt_against_oracle() -> tuple[np.ndarray, np.ndarray]:
    """Counts of one rank alone, and the same token by token; ids share rows."""
    training = LearningTraining(Setup(ep=2), rows=24)
    training.losses(1)
    mine = training.learner._counts_RLE.numpy().copy()
    expected = np.zeros_like(mine)
    for layer, maps in enumerate(training.routed):
        for ids_BS, map_TE in zip(training.seen_ids, maps, strict=True):
            for t, expert in map_TE.nonzero().tolist():
                expected[ids_BS[t % len(ids_BS), t // len(ids_BS)] % 24, layer, expert] += 1
    return mine, expected


def learns_in_evaluation() -> float:
    training = LearningTraining(Setup(ep=2))
    training.learner.start_step(0)
    training.model.eval()
    training.losses(1)
    return float(training.sync().counts.sum())


def placed_losses(setup: Setup, steps: int, *, placed: bool) -> tuple[list[float], int]:
    """Losses, and how many sequences moved in all; the table is updated at each step."""
    training = LearningTraining(setup)
    losses, moved = [], 0
    for _ in range(steps):
        losses += training.losses(1)
        if training.placement.report is not None:
            moved += training.placement.report.moved_sequences
        if placed:
            training.placement.use(PlacementPlan.contiguous(LAYERS, setup.ep, setup.experts), training.sync())
    return losses, moved


def shares(use_history: bool) -> dict[str, float]:
    """Measured local share in default order, and placed by what was learnt, of homes chosen for the sequences. The model stays the same."""
    training = LearningTraining(Setup(ep=2))
    training.optimizer.step = lambda: None
    training.losses(4)
    table = training.sync()
    contiguous = PlacementPlan.contiguous(LAYERS, 2, 8)
    tokens_BS = torch.cat([topical_batch(step)[:, :-1] for step in range(4)]).numpy()
    home_rank_LE = cluster_sequences(table.expected_counts(tokens_BS), contiguous.home_rank, 2, seed=0).home_rank_LE
    plan = PlacementPlan.from_hosts(home_rank_LE, home_rank_LE[:, :, None] == np.arange(2), replica_slots_per_rank=0)
    training.learner.set_plan(plan)
    training.learner.record_samples(training.history)
    training.learner.measured_share()  # of another plan
    training.step = 0
    training.losses(4)
    default = training.learner.measured_share()
    if use_history:
        training.placement.use(plan, AffinityTable.empty(VOCABULARY, LAYERS, 8, 2), training.history)
    else:
        training.placement.use(plan, table)
    training.step, predicted = 0, []
    for _ in range(4):
        training.losses(1)
        predicted.append(training.placement.report.placed_share)
    placed = training.learner.measured_share()
    return {"default": default, "placed": placed, "predicted": float(np.mean(predicted)), "seen": len(training.history)}
