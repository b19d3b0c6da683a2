"""Our MoE layer against Megatron's own, same weights and inputs: outputs and every gradient."""

import dataclasses

import pytest
import torch

from megatron_scalemoe.config import ScaleMoEConfig
from tests.rank_pool import pool


def compare(case_values: dict, kind: str = "scalemoe") -> dict[str, float]:
    """On a rank: largest relative difference of each tensor between the baseline and our layer."""
    from tests.mcore.megatron_case import LayerCase, run_layer

    case = LayerCase(**case_values)
    ours, stock = run_layer(case, kind), run_layer(case, case.baseline)
    assert ours.keys() == stock.keys()
    return {name: _difference(ours[name], stock[name]) for name in stock}


def _difference(a, b) -> float:
    if a is None or b is None:
        assert a is None and b is None
        return 0.0
    if b.numel() == 0:
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-20))


def compare_all(cases: list[dict]) -> list[dict[str, float]]:
    return [compare(values) for values in cases]


def check(world_size: int, *cases: dict) -> None:
    for rank, differences in enumerate(pool(world_size).run(compare_all, cases)):
        for values, of_case in zip(cases, differences, strict=True):
            tolerance = 1e-2 if values.get("dtype") is torch.bfloat16 else 1e-6
            assert len(of_case) > 3
            too_large = {name: value for name, value in of_case.items() if not value <= tolerance}
            assert not too_large, f"rank {rank}, {values}: {too_large}"


OURS = [{"transport": "shm"}, {"transport": "collective"}, {"dispatch": "padded"}]


@pytest.mark.parametrize(("world_size", "ep"), [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_expert_parallel_sizes(world_size, ep):
    check(world_size, *({"ep": ep, "scalemoe": ScaleMoEConfig(**options)} for options in OURS))


def test_allgather_dispatcher_as_baseline():
    check(4, {"ep": 4, "baseline": "allgather"}, {"ep": 2, "baseline": "allgather"})


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_top_k_and_skew(top_k):
    options = (("moe_router_pre_softmax", True),) if top_k == 1 else ()
    check(2, *({"top_k": top_k, "skew": skew, "options": options} for skew in (0.0, 1.5)))


def test_bf16():
    check(4, *({"ep": 4, "dtype": torch.bfloat16, "scalemoe": ScaleMoEConfig(**options)} for options in OURS))


@pytest.mark.parametrize(("tp", "ep", "expert_tp"), [(2, 2, 2), (2, 4, 1), (2, 2, 1), (2, 1, 2)])
def test_tensor_parallel(tp, ep, expert_tp):
    # stock alltoall cannot gather uneven expert-TP shards over gloo
    case = {"tp": tp, "ep": ep, "expert_tp": expert_tp, "baseline": "allgather" if expert_tp > 1 else "alltoall"}
    check(4, *({**case, "scalemoe": ScaleMoEConfig(**options)} for options in OURS[:2]))


OPTIONS = {
    "capacity": (("moe_expert_capacity_factor", 0.6), ("moe_router_load_balancing_type", "aux_loss")),
    "capacity-position": (("moe_expert_capacity_factor", 0.6), ("moe_token_drop_policy", "position")),
    "pad-to-capacity": (("moe_expert_capacity_factor", 0.8), ("moe_pad_expert_input_to_capacity", True)),
    "shared-experts": (("moe_shared_expert_intermediate_size", 24),),
    "shared-expert-gate": (("moe_shared_expert_intermediate_size", 24), ("moe_shared_expert_gate", True)),
    "aux-loss": (("moe_router_load_balancing_type", "aux_loss"), ("moe_aux_loss_coeff", 0.1)),
    "seq-aux-loss": (("moe_router_load_balancing_type", "seq_aux_loss"), ("moe_aux_loss_coeff", 0.1)),
    "global-aux-loss": (("moe_router_load_balancing_type", "global_aux_loss"), ("moe_aux_loss_coeff", 0.1)),
    "z-loss": (("moe_z_loss_coeff", 0.1),),
    "sinkhorn": (("moe_router_load_balancing_type", "sinkhorn"),),
    "sigmoid-expert-bias": (("moe_router_score_function", "sigmoid"), ("moe_router_enable_expert_bias", True)),
    "group-limited": (("moe_router_num_groups", 4), ("moe_router_group_topk", 2)),
    "router-fp32": (("moe_router_dtype", "fp32"),),
    "router-fp64": (("moe_router_dtype", "fp64"),),
    "probs-on-input": (("moe_apply_probs_on_input", True), ("moe_router_topk", 1), ("moe_router_pre_softmax", True)),
    "swiglu": (("gated_linear_unit", True), ("activation_func", torch.nn.functional.silu)),
    "recompute-moe": (("recompute_granularity", "selective"), ("recompute_modules", ["moe"])),
}


@pytest.mark.parametrize("transport", ["shm", "collective"])
def test_options(transport):
    check(2, *({"options": options, "scalemoe": ScaleMoEConfig(transport=transport)} for options in OPTIONS.values()))


def test_a_single_token_per_rank():
    check(4, {"ep": 4, "top_k": 1, "seq": 1, "batch": 1, "options": (("moe_router_pre_softmax", True),)})


def off_means_off() -> list[str]:
    """Class names of the modules and dispatcher of a layer built without our flag."""
    from tests.mcore.megatron_case import LayerCase, make_layer

    layer = make_layer(LayerCase(), "alltoall")
    return [type(module).__module__ for module in layer.modules()] + [type(layer.token_dispatcher).__module__]


def test_without_our_flag_the_layer_is_megatrons():
    for modules in pool(2).run(off_means_off):
        assert all(name.startswith(("megatron.core", "torch")) for name in modules), modules


def use_scalemoe_leaves_the_spec_alone() -> tuple[bool, str, str]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_scalemoe import use_scalemoe

    def parts(mlp) -> tuple:
        return (mlp.module, mlp.submodules) if isinstance(mlp, ModuleSpec) else (mlp.func, mlp.keywords["submodules"])

    spec = get_gpt_layer_local_spec(num_experts=4)
    layer, submodules = parts(spec.submodules.mlp)
    before = dataclasses.replace(submodules)
    ours, our_submodules = parts(use_scalemoe(spec, ScaleMoEConfig(experts="grouped")).submodules.mlp)
    unchanged = parts(spec.submodules.mlp) == (layer, before) and our_submodules != before
    return unchanged, layer.__name__, ours.__name__


def test_use_scalemoe_copies():
    assert pool(2).run(use_scalemoe_leaves_the_spec_alone)[0] == (True, "MoELayer", "ScaleMoELayer")
