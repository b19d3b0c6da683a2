"""Grouped experts against Megatron's SequentialMLP: weights at start, results, gradients, and what a checkpoint holds."""

import pytest
import torch

from tests.rank_pool import pool

SWIGLU = (("gated_linear_unit", True), ("activation_func", torch.nn.functional.silu))
OPTIONS = {
    "plain": (),
    "swiglu": SWIGLU,
    "swiglu-fused": (*SWIGLU, ("bias_activation_fusion", True)),
    "probs-on-input": (("moe_apply_probs_on_input", True), ("moe_router_topk", 1), ("moe_router_pre_softmax", True)),
    "other-ffn-size": (("moe_ffn_hidden_size", 24),),
}
COUNTS = {"some": [5, 0, 9, 1], "one hot": [0, 0, 7, 0], "none": [0, 0, 0, 0]}
EXPERT_TP = {"tp": 2, "ep": 2, "expert_tp": 2}


def result_differences(case_values: dict) -> dict[str, float]:
    """On a rank: largest difference of each tensor between SequentialMLP and ours, relative to the largest value."""
    from tests.mcore.layers.experts_case import LayerCase, make_experts, run_experts

    case, differences = LayerCase(**case_values), {}
    for title, counts in COUNTS.items():
        sequential, grouped = (run_experts(make_experts(case, kind), counts) for kind in ("sequential", "grouped"))
        for name, expected in sequential.items():
            assert grouped[name].shape == expected.shape and grouped[name].dtype == expected.dtype
            largest = [float(tensor.double().abs().max()) if tensor.numel() else 0.0 for tensor in (grouped[name] - expected, expected)]
            differences[f"{name}, {title}"] = largest[0] / max(largest[1], 1e-20)
    return differences


def check_results(world_size: int, case_values: dict) -> None:
    tolerance = 1e-2 if case_values.get("dtype") is torch.bfloat16 else 1e-6
    for differences in pool(world_size).run(result_differences, case_values):
        assert len(differences) == 5 * len(COUNTS)
        assert max(differences.values()) <= tolerance, differences


@pytest.mark.parametrize("name", OPTIONS)
def test_results_and_gradients(name):
    check_results(2, {"ep": 2, "options": OPTIONS[name]})


def test_results_in_bf16():
    check_results(2, {"ep": 2, "dtype": torch.bfloat16, "options": OPTIONS["swiglu-fused"]})


def test_results_with_expert_tensor_parallel():
    check_results(4, {**EXPERT_TP, "options": SWIGLU})


def gradient_of_a_sum() -> bool:
    from tests.mcore.layers.experts_case import LayerCase, make_experts

    experts = make_experts(LayerCase(), "grouped")
    y, _ = experts(torch.ones(3, 16), torch.tensor([1, 0, 2, 0]), torch.ones(3))
    y.sum().backward()
    return bool(experts.fc2.grad[2].abs().sum() > 0)


def test_an_expanded_gradient_is_accepted():
    assert all(pool(2).run(gradient_of_a_sum))


def starts_alike(case_values: dict) -> bool:
    """Same weights, same marks on the parameters, and the random generators left in the same state."""
    from tests.mcore.layers.experts_case import LayerCase, get_cuda_rng_tracker, make_experts, stacked

    case, starts = LayerCase(**case_values), []
    for kind in ("sequential", "grouped"):
        experts = make_experts(case, kind)
        starts.append((experts, torch.get_rng_state(), get_cuda_rng_tracker().get_states()))
    (sequential, rng_state, tracked), (grouped, our_rng_state, our_tracked) = starts
    assert torch.equal(rng_state, our_rng_state)
    assert all(torch.equal(state, our_tracked[name]) for name, state in tracked.items())
    one = sequential.local_experts[0]
    for ours, stock in ((grouped.fc1, one.linear_fc1.weight), (grouped.fc2, one.linear_fc2.weight)):
        names = ("allreduce", "tensor_model_parallel", "partition_stride")
        assert [getattr(ours, name) for name in names] == [getattr(stock, name) for name in names]
        assert ours.partition_dim == stock.partition_dim + 1
    weights, our_weights = stacked(sequential), stacked(grouped)
    return all(torch.equal(weights[name], our_weights[name]) for name in weights)


@pytest.mark.parametrize(("on_cpu", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_initial_weights(on_cpu, dtype):
    options = (("use_cpu_initialization", on_cpu), *SWIGLU)
    assert all(pool(4).run(starts_alike, {**EXPERT_TP, "dtype": dtype, "options": options}))


def same_checkpoint_entries(options: tuple, singleton: bool, sharded_offsets: tuple) -> int:
    """Compares every sharded tensor and object that both modules describe; how many there are."""
    from tests.mcore.layers.experts_case import LayerCase, make_experts, sharded_entries

    case, metadata = LayerCase(**EXPERT_TP, options=options), {"singleton_local_shards": singleton}
    sequential, grouped = (sharded_entries(make_experts(case, kind), sharded_offsets, metadata) for kind in ("sequential", "grouped"))
    assert sequential.keys() == grouped.keys()
    for place, (description, tensor) in sequential.items():
        our_description, our_tensor = grouped[place]
        assert our_description == description
        assert tensor is our_tensor is None or torch.equal(tensor, our_tensor)
    return len(sequential)


@pytest.mark.parametrize("singleton", [False, True])
def test_checkpoint_entries(singleton):
    assert pool(4).run(same_checkpoint_entries, (), singleton, ((0, 1, 3),)) == [4 * 4] * 4
    assert pool(4).run(same_checkpoint_entries, SWIGLU, singleton, ()) == [4 * 5] * 4
