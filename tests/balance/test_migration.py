"""Migration of expert homes: bitwise the same state by logical expert, for every optimizer; all or nothing with planted faults."""

import pytest

from tests.rank_pool import pool

DISTRIBUTED = {"distributed_optimizer": True}
TENSORS = ["exp_avg", "exp_avg_sq", "param", "weight"]  # the oracle lists the main copy, which is the weight itself in fp32


def on_ranks(ranks: int, name: str, *args, **kwargs) -> list:
    return pool(ranks).run(_call, name, args, kwargs)


def _call(name: str, args: tuple, kwargs: dict):
    from tests.balance import migration_case

    return getattr(migration_case, name)(*args, **kwargs)


def check(results: list[dict], tensors: list[str] = TENSORS) -> None:
    for result in results:
        assert result["reason"] == result["back"] == ""
        assert result["different"] == [] and result["different_back"] == []
        assert result["homes_fit"]
        assert result["tensors"] == tensors
        assert result["distinct"] > 0.4  # the experts differ, so an expert in another's place is seen


@pytest.mark.parametrize("options", [{}, {"bf16": True, **DISTRIBUTED}], ids=str)
def test_two_ranks(options):
    results = on_ranks(2, "migrate", {"ep": 2, **options}, seed=1)
    check(results)
    assert all(result["experts"] == 16 and result["moves"] > 0 for result in results)


@pytest.mark.parametrize(
    "options",
    [
        {"ep": 4, **DISTRIBUTED},
        {"ep": 2, "bf16": True, **DISTRIBUTED},
        {"ep": 2, "tp": 2, **DISTRIBUTED},
        {"ep": 2, "tp": 2, "expert_tp": 2, "bf16": True, **DISTRIBUTED},
        {"ep": 2, "pp": 2, "bf16": True},
    ],
    ids=str,
)
def test_four_ranks(options):
    check(on_ranks(4, "migrate", options, seed=2))


OVERLAP = {"ep": 2, "overlap": True, "bf16": True, **DISTRIBUTED}


def test_weights_that_are_not_gathered_yet_and_experts_cut_by_the_distributed_optimizer():
    """With overlap, the other ranks' shares of the weights are those of the step before until the next forward."""
    moves_every_expert = 3
    results = on_ranks(4, "migrate", {**OVERLAP, "experts": 6}, seed=moves_every_expert, gathered=False)
    check(results)
    assert any(result["cut"] for result in results)


@pytest.mark.parametrize(("ranks", "options"), [(2, {"ep": 2}), (4, OVERLAP)], ids=str)
def test_training_goes_on_after_a_round_trip(ranks, options):
    for want, got, old_weights in on_ranks(ranks, "losses_after_a_round_trip", options):
        assert got == want
        assert old_weights == ("overlap" in options)


@pytest.mark.parametrize(("ranks", "options"), [(2, {"bf16": True}), (4, DISTRIBUTED)], ids=str)
def test_checkpoints_are_the_same(ranks, options, tmp_path):
    assert on_ranks(ranks, "checkpoint_differences", tmp_path, {"ep": 2, **options}) == [[]] * ranks


def test_slots_within_ranks():
    results = on_ranks(2, "migrate", {"ep": 1, **DISTRIBUTED}, seed=1, within_ranks=True)
    check(results)
    assert results[0]["moves"] == 0


@pytest.mark.parametrize("options", [{"bf16": True}, DISTRIBUTED], ids=str)
def test_before_the_first_step(options):
    check(on_ranks(2, "migrate", {"ep": 2, "steps": 0, **options}, seed=1), tensors=["param", "weight"])


SAID = {
    "no memory": "rank 1: MemoryError",
    "changed bit": "was changed on its way",
    "swapped values": "was changed on its way",
    "other expert": "was due",
    "cannot pack": "rank 1: MemoryError",
    "unknown parameter": "rank 1: MemoryError",
}


@pytest.mark.parametrize(
    ("ranks", "options", "faults"), [(2, {"bf16": True}, list(SAID)), (4, DISTRIBUTED, ["cannot pack"])], ids=["ep2", "ep2 x dp2"]
)
def test_a_fault_on_one_rank_changes_nothing_anywhere(ranks, options, faults):
    """One after the other; then the homes can still move."""
    results = on_ranks(ranks, "refused", {"ep": 2, **options}, faults, rank=1)
    for result in results:
        for fault, reason in zip(faults, result["reasons"], strict=True):
            assert SAID[fault] in reason and "rank" in reason
        assert result["reasons"] == results[0]["reasons"]
        assert result["homes_kept"] and result["different"] == []
        assert result["again"] == "" and result["different_again"] == []


def test_ranks_with_other_plans_are_refused():
    for other_new, other_old, other_size in on_ranks(2, "other_plans"):
        assert "rank 1 disagrees with rank 0" in other_new
        assert "rank 1: layer 0: the homes must be those of the old plan" in other_old
        assert "rank 0: the new plan must be for the 2 ranks" in other_size


def test_a_lost_expert_is_an_error_on_all_ranks():
    for message in on_ranks(2, "lost_expert"):
        assert "rank 1: layer 1: the homes must be those of the new plan" in message
