"""Ranks that were started with different settings are told which, on every rank."""

from unittest import mock

import torch.distributed as dist

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.faults.agreement import _canonical, check_ranks_agree
from tests.rank_pool import pool

SETTINGS = {"lr": 1e-4, "swiglu": True, "save": None, "data_path": ["a", "b"], "moe_router_topk": 2}


def disagreement(by_rank: list[dict]) -> str:
    """The error that this rank gets, or "" """
    try:
        check_ranks_agree(by_rank[dist.get_rank()])
    except ScaleMoEError as error:
        return str(error)
    return ""


def test_the_same_settings_are_accepted():
    order = [dict(SETTINGS), dict(reversed(SETTINGS.items()))]
    assert pool(2).run(disagreement, order) == ["", ""]


def test_the_differing_flags_their_values_and_ranks_are_named_on_every_rank():
    odd = {**SETTINGS, "lr": 1e-3, "data_path": ["a"]}
    without = {name: value for name, value in SETTINGS.items() if name != "save"}
    messages = pool(4).run(disagreement, [SETTINGS, odd, SETTINGS, without])
    assert len(set(messages)) == 1
    assert "--lr: 0.0001 on ranks 0, 2-3; 0.001 on rank 1" in messages[0]
    assert "--data-path: ['a', 'b'] on ranks 0, 2-3; ['a'] on rank 1" in messages[0]
    assert "--save: None on ranks 0-2; not set on rank 3" in messages[0]
    assert "--swiglu" not in messages[0]


def test_the_fields_of_a_dataclass_are_flags():
    configs = [ScaleMoEConfig(experts="megatron"), ScaleMoEConfig(experts="grouped")]
    messages = pool(2).run(disagreement, [{"scalemoe_experts": None, "scalemoe": config} for config in configs])
    assert "--scalemoe-experts: 'megatron' on rank 0; 'grouped' on rank 1" in messages[0]
    assert messages[0].count("--scalemoe") == 1


def with_other_code() -> str:
    if dist.get_rank() == 1:
        with mock.patch("megatron_scalemoe.faults.agreement.code_digest", return_value="edited"):
            return disagreement([SETTINGS] * 2)
    return disagreement([SETTINGS] * 2)


def test_ranks_with_other_code_are_named():
    messages = pool(2).run(with_other_code)
    assert messages[0] == messages[1]
    assert "files edited on rank 1" in messages[0]


def in_a_subgroup() -> str:
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    try:
        check_ranks_agree({"seed": 5 if dist.get_rank() == 3 else 4}, group)
    except ScaleMoEError as error:
        return str(error)
    return ""


def test_only_the_group_must_agree():
    messages = pool(4).run(in_a_subgroup)
    assert messages[:2] == ["", ""]
    assert all("--seed: 4 on rank 2; 5 on rank 3" in message for message in messages[2:])


def test_the_text_of_a_value_is_the_same_in_every_process():
    assert _canonical({"b": {"y", "x"}, "a": (1, 2.0)}) == "{'a': [1, 2.0], 'b': {'x', 'y'}}"
    assert _canonical(object()) == _canonical(object())
    assert _canonical(test_only_the_group_must_agree) != _canonical(in_a_subgroup)
