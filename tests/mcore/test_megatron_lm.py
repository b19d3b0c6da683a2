"""Our hooks in Megatron-LM, as far as they need no checkout of it; the real scripts are in tests/megatron_lm."""

from __future__ import annotations

import argparse

import pytest

from tests.rank_pool import pool


def parsed(*flags: str) -> tuple[dict, list[str], list]:
    """A parser with one flag of its own and ours: what it parses, what it does not know, and the configurations that were attached."""
    from tests.mcore import megatron_case  # noqa: F401 - installs the CPU ranks

    # isort: split
    from unittest import mock

    from megatron_scalemoe.mcore.scripts import megatron_lm

    attached = []
    with mock.patch.object(megatron_lm, "attach", attached.append):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--num-layers", type=int)
        known, unknown = megatron_lm.add_flags(parser).parse_known_args(flags)
        if not unknown:
            assert parser.parse_args(flags) == known
    return vars(known), unknown, attached


@pytest.mark.parametrize("flags", [(), ("--moe-dispatcher", "stock")])
def test_without_us_the_arguments_are_as_if_we_did_not_exist(flags):
    assert pool(2).run(parsed, "--num-layers", "2", *flags) == [({"num_layers": 2}, [], [])] * 2


def test_with_us_the_flags_are_parsed_and_we_attach():
    for known, unknown, attached in pool(2).run(parsed, "--moe-dispatcher", "scalemoe", "--scalemoe-replicas", "4", "--scalemoe-nonsense"):
        assert known["scalemoe_replicas"] == 4
        assert unknown == ["--scalemoe-nonsense"]
        assert [config.replicas for config in attached] == [4]


def layers_of(kind: str) -> list[str]:
    """What MoE layers a GPT has that is built from Megatron's own spec, after our hook on transformer layers or without it."""
    from tests.mcore.tiny_gpt import Setup, Training

    # isort: split
    from unittest import mock

    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_scalemoe.config import ScaleMoEConfig
    from megatron_scalemoe.mcore.scripts import megatron_lm

    hooked = megatron_lm._building_our_layers(TransformerLayer.__init__, ScaleMoEConfig(experts="grouped"))
    with mock.patch.object(TransformerLayer, "__init__", hooked if kind == "ours" else TransformerLayer.__init__):
        training = Training(Setup(ep=2))
    losses = training.losses(2)
    layers = [module for module in training.model.modules() if isinstance(module, MoELayer)]
    return [*(f"{type(layer).__name__} {type(layer.experts).__name__}" for layer in layers), *(f"{loss:.5f}" for loss in losses)]


def test_layers_of_any_spec_become_ours():
    stock, ours = pool(2).run(layers_of, "stock")[0], pool(2).run(layers_of, "ours")[0]
    assert stock[:2] == ["MoELayer SequentialMLP"] * 2
    assert ours[:2] == ["ScaleMoELayer ScaleMoEGroupedMLP"] * 2
    assert ours[2:] == stock[2:]


def version_problem(version: str) -> str:
    from tests.mcore import megatron_case  # noqa: F401 - installs the CPU ranks

    # isort: split
    from unittest import mock

    import megatron.core

    from megatron_scalemoe.errors import ScaleMoEError
    from megatron_scalemoe.mcore.compat import check_megatron_core

    with mock.patch.object(megatron.core, "__version__", version):
        try:
            check_megatron_core()
        except ScaleMoEError as error:
            return str(error)
    return ""


def test_other_versions_of_megatron_are_refused():
    assert pool(2).run(version_problem, "0.16.2") == ["", ""]
    for problem in pool(2).run(version_problem, "0.18.2"):
        assert "megatron-core 0.18.2 in " in problem
        assert "Megatron-LM at its tag core_v0.16.1" in problem
