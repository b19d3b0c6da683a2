"""Global batches keep their sequences, only other ranks compute them; the table learns what the routers chose; the loss stays."""

import functools

import numpy as np
import pytest
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import AffinityTable
from tests.rank_pool import pool

MICRO_BATCHES, MICRO_BATCH, TENSOR_RANKS = 2, 3, 2
PER_RANK = MICRO_BATCHES * MICRO_BATCH
PLAN = PlacementPlan.contiguous(1, 2, 4)


def topic_table(learnt: bool) -> AffinityTable:
    """Ids 0..9 choose the experts of rank 0, ids 10..19 those of rank 1."""
    counts = np.zeros((20, 1, 4), np.float32)
    counts[:10, 0, :2] = counts[10:, 0, 2:] = 1000.0 * learnt
    return AffinityTable(counts, 2)


def tokens_of_samples(ids) -> np.ndarray:
    """[ids, 8] token ids: a sample's topic is random, but always the same."""
    return np.stack([np.random.default_rng(int(i)).integers(2) * 10 + np.random.default_rng(int(i)).integers(10, size=8) for i in ids])


class InOrder:
    """Yields samples as Megatron's sequential sampler does: each micro-batch of all data-parallel ranks takes the next ones."""

    def __init__(self, total: int, consumed: int, rank: int, ranks: int):
        self.total, self.consumed, self.rank, self.step = total, consumed, rank, MICRO_BATCH * ranks

    def __len__(self) -> int:
        return self.total

    def __iter__(self):
        for first in range(self.consumed, self.total - self.step + 1, self.step):
            yield list(range(first + self.rank * MICRO_BATCH, first + (self.rank + 1) * MICRO_BATCH))


def placement_of(data_parallel_rank: int, owner: bool):
    from tests.mcore import megatron_case  # noqa: F401, I001 - first: it installs the CPU ranks
    from megatron_scalemoe.balance.sequences.sequence_placement import BatchLayout, SequencePlacement

    layout = BatchLayout(data_parallel_rank, np.array([[0], [1]]), MICRO_BATCHES, MICRO_BATCH)
    return SequencePlacement(layout, group=dist.group.WORLD, owner=owner)


def sampled(total: int, consumed: int, learnt: bool, tensor_ranks: int = 1) -> tuple[list[list[int]], object, int]:
    """This rank's micro-batches, the last report, and how many samples it read to score them."""
    rank, tensor_rank = divmod(dist.get_rank(), tensor_ranks)
    placement, read = placement_of(rank, tensor_rank == 0), []
    from megatron_scalemoe.balance.sequences.sampler import PlacedBatchSampler  # after placement_of

    placement.use(PLAN, topic_table(learnt))
    sampler = PlacedBatchSampler(InOrder(total, consumed, rank, 2), placement, lambda ids: read.extend(ids) or tokens_of_samples(ids))
    assert len(sampler) == total
    return [list(micro_batch) for micro_batch in sampler], placement.report, len(read)


def local_share(micro_batches: list, rank: int) -> float:
    return float((tokens_of_samples([i for batch in micro_batches for i in batch]) // 10 == rank).mean())


def test_every_global_batch_keeps_its_sequences():
    (first, report, _), (second, _, _) = pool(2).run(sampled, 60, 0, True)
    for step in range(5):
        rows = slice(step * MICRO_BATCHES, (step + 1) * MICRO_BATCHES)
        assert sorted(i for micro_batch in first[rows] + second[rows] for i in micro_batch) == list(range(step * 12, (step + 1) * 12))
    assert {len(batch) for batch in first + second} == {MICRO_BATCH}
    before = np.mean([local_share(list(InOrder(60, 0, rank, 2)), rank) for rank in range(2)])
    after = np.mean([local_share(batches, rank) for rank, batches in enumerate((first, second))])
    assert after > before + 0.2
    assert report.moved_sequences % 2 == 0
    assert report.placed_share > report.default_share + 0.1


def test_nothing_learnt_is_the_default_order():
    for rank, (batches, report, _) in enumerate(pool(2).run(sampled, 36, 0, False)):
        assert batches == list(InOrder(36, 0, rank, 2))
        assert (report.moved_sequences, report.default_share, report.placed_share) == (0, 0.5, 0.5)


def test_resuming_at_a_global_batch_goes_on_alike():
    whole, resumed = pool(2).run(sampled, 60, 0, True), pool(2).run(sampled, 60, 24, True)
    for (batches, _, _), (rest, _, _) in zip(whole, resumed, strict=True):
        assert rest == batches[2 * MICRO_BATCHES :]


def test_an_incomplete_last_batch_stays():
    for rank, (batches, _, _) in enumerate(pool(2).run(sampled, 18, 0, True)):
        assert len(batches) == 3
        assert batches[-1] == list(InOrder(18, 0, rank, 2))[-1]


def test_ranks_that_share_sequences_agree_and_only_owners_read_them():
    results = pool(4).run(sampled, 36, 0, True, TENSOR_RANKS)
    for owner, other in (results[:2], results[2:]):
        assert owner[0] == other[0] != list(InOrder(36, 0, 0, 2))
        assert (owner[2], other[2]) == (18, 0)


def misplaced() -> str:
    """Both ranks say that they speak for data-parallel rank 0."""
    placement = placement_of(0, True)
    placement.use(PLAN, topic_table(True))
    with pytest.raises(ScaleMoEError, match="must have the same sequences") as caught:
        placement.place(tokens_of_samples(range(PER_RANK)), np.arange(PER_RANK) + 1)
    return str(caught.value)


def test_ranks_that_disagree_about_the_batch_are_told():
    assert "rank 1" in pool(2).run(misplaced)[1]


def before_use() -> list:
    return placement_of(dist.get_rank(), True).place(None, np.arange(PER_RANK)).tolist()


def test_the_default_order_before_anything_is_known():
    assert pool(2).run(before_use) == [np.arange(PER_RANK).reshape(MICRO_BATCHES, -1).tolist()] * 2


def on_ranks(ranks: int, function: str, *args, **kwargs) -> list:
    return pool(ranks).run(functools.partial(in_case, function, **kwargs), *args)


def in_case(function: str, *args, **kwargs):
    """args: options of a Setup become one."""
    from tests.balance import sampler_case

    args = [sampler_case.Setup(**arg) if isinstance(arg, dict) else arg for arg in args]
    return getattr(sampler_case, function)(*args, **kwargs)


@pytest.mark.parametrize(("ranks", "options"), [(2, {"ep": 2, "tp": 2}), (2, {"ep": 2, "recompute": True}), (4, {"ep": 2, "pp": 2})])
def test_every_token_is_learnt_once(ranks, options):
    for result in on_ranks(ranks, "learnt_counts", options):
        np.testing.assert_array_equal(result["learnt"].sum(axis=2), 2 * result["histogram"][:, None] * np.ones((1, 2)))
        np.testing.assert_array_equal(result["again"], result["learnt"])


def test_tokens_meet_their_own_experts_in_the_table():
    for mine, expected in on_ranks(2, "learnt_against_oracle"):
        np.testing.assert_array_equal(mine, expected)


def test_evaluation_teaches_nothing():
    assert on_ranks(2, "learns_in_evaluation") == [0.0, 0.0]


def test_the_loss_does_not_change_when_the_stages_of_a_pipeline_load_placed_sequences():
    """They must be the same on the first and the last stage. Without a pipeline: test_live.py."""
    (stock, _), (placed, moved) = (on_ranks(4, "placed_losses", {"ep": 2, "pp": 2}, 6, placed=placed)[0] for placed in (False, True))
    assert moved > 4
    np.testing.assert_allclose(placed, stock, rtol=1e-5)


@pytest.mark.parametrize("use_history", [False, True])
def test_more_of_a_models_selections_are_local(use_history):
    """Measured in the routers, on data of two topics."""
    first, second = on_ranks(2, "shares", use_history)
    assert first == second
    assert first["default"] == pytest.approx(0.5, abs=0.08)
    assert first["placed"] > first["default"] + 0.05
    if use_history:  # the model has not changed
        assert first["predicted"] == pytest.approx(first["placed"])
    else:  # smoothing makes the table cautious
        assert first["default"] < first["predicted"] < first["placed"] + 0.02
    assert first["seen"] == 16


def placed_in_a_circle() -> int:
    """The sample that this rank computes, where each rank's sequence is of tokens whose expert the next rank has."""
    from megatron_scalemoe.balance.sequences.sequence_placement import BatchLayout, SequencePlacement

    rank = dist.get_rank()
    counts_RLE = 1000 * np.eye(4, dtype=np.float32)[:, None]
    placement = SequencePlacement(BatchLayout(rank, np.arange(4)[:, None], 1, 1), group=dist.group.WORLD, owner=True)
    placement.use(PlacementPlan.contiguous(1, 4, 4), AffinityTable(counts_RLE, 1))
    return placement.place(np.full((1, 8), (rank + 1) % 4), np.array([rank])).item()


def test_sequences_go_to_the_rank_of_their_experts_and_not_from_there():
    assert pool(4).run(placed_in_a_circle) == [3, 0, 1, 2]
