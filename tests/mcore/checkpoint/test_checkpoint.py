"""Checkpoints of a stock Megatron model: exact resume, every change of layout, stock Megatron on the other end, damage."""

from pathlib import Path

import pytest

from tests.rank_pool import pool

KINDS = {"plain": {}, "distributed": {"distributed_optimizer": True, "overlap": True, "swiglu": True}, "bf16": {"bf16": True}}
TOLERANCE = {"plain": 1e-6, "distributed": 1e-6, "bf16": 1e-3}  # another layout adds gradients in another order
NOW = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}  # metadata that Megatron-Core 0.14 and later save with


def on_ranks(ranks: int, name: str, *args, **kwargs) -> list:
    return pool(ranks).run(_call, name, args, kwargs)


def _call(name: str, args: tuple, kwargs: dict):
    from tests.mcore.checkpoint import checkpoint_case

    return getattr(checkpoint_case, name)(*args, **kwargs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(kind, ep)`: a checkpoint written by two ranks, made once, and the losses of the run that wrote it."""
    made: dict[tuple[str, int], tuple[Path, list[float]]] = {}

    def make(kind: str, ep: int) -> tuple[Path, list[float]]:
        if (kind, ep) not in made:
            directory = tmp_path_factory.mktemp(f"{kind}{ep}") / "checkpoints"
            made[kind, ep] = directory, on_ranks(2, "train_and_save", directory, dict(ep=ep, **KINDS[kind]))[0]
        return made[kind, ep]

    return make


@pytest.mark.parametrize(("kind", "ep"), [("plain", 1), ("distributed", 2), ("bf16", 2)])
def test_resume_is_exact_with_dropout(kind, ep, tmp_path):
    for want, got, rng_continued, extra in on_ranks(2, "resume_with_dropout", tmp_path, dict(ep=ep, **KINDS[kind])):
        assert got == want
        assert rng_continued
        assert extra == {"consumed_samples": 16}


@pytest.mark.parametrize(("kind", "written", "read"), [("plain", 1, 2), ("distributed", 1, 2), ("distributed", 2, 1), ("bf16", 2, 1)])
def test_two_ranks_change_the_expert_parallel_size(kind, written, read, saved):
    directory, want = saved(kind, written)
    for got in on_ranks(2, "resume", directory, dict(ep=read, **KINDS[kind])):
        assert got == pytest.approx(want, abs=TOLERANCE[kind])


def test_four_ranks_read_ep_2_at_ep_4_and_back(saved, tmp_path):
    directory, want = saved("distributed", 2)
    for got in on_ranks(4, "resume", directory, dict(ep=4, **KINDS["distributed"]), save_to=tmp_path):
        assert got == pytest.approx(want, abs=1e-6)
    for got in on_ranks(2, "resume", tmp_path, dict(ep=2, **KINDS["distributed"])):
        assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "experts", "ep"), [("plain", "megatron", 1), ("plain", "grouped", 1), ("distributed", "grouped", 2), ("bf16", "grouped", 1)]
)
def test_our_layers_read_stock_megatron_and_back(kind, experts, ep, saved, tmp_path):
    directory, want = saved(kind, 2)
    for got in on_ranks(2, "resume", directory, dict(ep=ep, scalemoe_experts=experts, **KINDS[kind]), save_to=tmp_path):
        assert got == pytest.approx(want, abs=max(1e-5, TOLERANCE[kind]))
    for got in on_ranks(2, "resume", tmp_path, dict(ep=2, **KINDS[kind])):
        assert got == pytest.approx(want, abs=TOLERANCE[kind])


def test_tensor_parallel_with_sequence_parallel_norm(saved):
    """The losses agree only if the norm's gradients are added up over the tensor-parallel ranks."""
    directory, want = saved("plain", 2)
    for got in on_ranks(4, "resume", directory, dict(tp=2, ep=2, dispatcher="allgather")):
        assert got == pytest.approx(want, abs=1e-6)


def test_pipeline_parallel(saved):
    directory, want = saved("plain", 2)
    for got in on_ranks(2, "resume", directory, dict(pp=2)):
        assert got == pytest.approx(want, abs=1e-6)


def test_weights_only(saved):
    """In bf16 the optimizer must take the weights over, or its first step would bring the old ones back."""
    directory, want = saved("bf16", 2)
    for got in on_ranks(2, "resume", directory, dict(ep=2, bf16=True), weights_only=True):
        assert got[0] == want[0]
        assert got[1:] == pytest.approx(want[1:], abs=0.15)


@pytest.mark.parametrize(("metadata", "sizes"), [(NOW, [1]), ({}, [2, 1])], ids=["0.16", "0.13, with chained_N. before optimizer keys"])
def test_reads_what_stock_megatron_wrote(metadata, sizes, tmp_path):
    want = on_ranks(2, "stock_writes", tmp_path, dict(ep=2), metadata)[0]
    for ep in sizes:
        for got in on_ranks(2, "resume", tmp_path, dict(ep=ep)):
            assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("kind", ["plain", "bf16"])
def test_stock_megatron_reads_ours(kind, saved):
    directory, want = saved(kind, 2)
    assert on_ranks(2, "stock_reads", directory, dict(ep=2, **KINDS[kind])) == [want, want]


@pytest.mark.parametrize("kind", ["plain", "distributed"])
def test_before_the_first_step(kind, tmp_path):
    for want, got in on_ranks(2, "before_the_first_step", tmp_path, dict(ep=2, **KINDS[kind])):
        assert got == want


def test_damage_is_named_and_older_iterations_stay_usable(tmp_path):
    for messages in on_ranks(2, "damaged", tmp_path):
        files = {name for name in messages if "." in name}
        assert {"__1_0.distcp", ".metadata", "metadata.json"} <= files
        for name in files:
            assert "iteration 2" in messages[name]
            assert str(tmp_path / "iter_0000002" / name) in messages[name]
            assert "--ckpt-step 1" in messages[name]
        assert "decoder.layers.mlp.router.weight" in messages["other experts"]
        assert "iter_0000007" in messages["no such iteration"] and "--ckpt-step 2 or 1" in messages["no such iteration"]
        assert "nowhere" in messages["no checkpoint"]
        assert "'release'" in messages["tracker"]


def test_weights_that_are_still_to_be_gathered_are_saved(saved):
    """With overlap_param_gather a rank's weights are old, but for its own share, until the next forward."""
    directory, want = saved("distributed", 1)
    for got in on_ranks(2, "resume", directory, dict(ep=1, swiglu=True), weights_only=True):
        assert got[0] == pytest.approx(want[0], abs=1e-6)


@pytest.mark.parametrize(("kind", "experts"), [("plain", "grouped"), ("distributed", "grouped"), ("bf16", None)])
def test_state_that_is_not_what_was_saved_is_named(kind, experts, tmp_path):
    for messages in on_ranks(2, "planted", tmp_path, dict(ep=2, scalemoe_experts=experts, **KINDS[kind])):
        assert " exp_avg float32" in messages["_swap_moments"] and "experts.linear_fc" in messages["_swap_moments"]
        assert (" weight float32" if kind == "plain" else " param float32") in messages["_swap_main_parameters"]
        for message in messages.values():
            assert "tensors are not what they were when it was saved" in message and "iter_0000002" in message


def test_flat_buffers_are_read_into_their_own_order_or_refused(tmp_path):
    """Stock Megatron's default format of the distributed optimizer."""
    options = dict(ep=2, distributed_optimizer=True)
    want = on_ranks(2, "stock_writes", tmp_path, options, {**NOW, "distrib_optim_sharding_type": "dp_reshardable"})[0]
    assert on_ranks(2, "resume", tmp_path, options) == [want, want]
    assert on_ranks(2, "resume", tmp_path, dict(**options, scalemoe_experts="megatron")) == [want, want]
    for message in on_ranks(2, "refused_load", tmp_path, dict(**options, scalemoe_experts="grouped")):
        assert "dp_reshardable" in message and "--ckpt-convert-save" in message


def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path):
    for result in on_ranks(2, "interrupted", tmp_path):
        assert "No space left on device" in result["message"] and "iteration 2" in result["message"]
        assert (result["kept"], result["latest"]) == (1, 2)
        assert result["files"] == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]


def test_refusals(tmp_path):
    for reserved, not_plain in on_ranks(2, "refused_extra", tmp_path):
        assert "rng_state" in reserved
        assert "step is a function" in not_plain
    for sgd, psutil in on_ranks(2, "refused_support"):
        assert "SGD" in sgd
        assert "pip install psutil" in psutil
    assert not list(tmp_path.iterdir())
