"""The real pretrain_gpt.py with our flag has stock's loss, in every layout."""

import itertools
from pathlib import Path

import pytest

from tests.megatron_lm.script import MOCK_DATA, OURS, TOLERANCE, differences, needs_checkout, run, save_some_plan, stock

pytestmark = needs_checkout

OVERLAP = "ep 2, dp 2, distributed optimizer with overlap"
# ranks and Megatron's flags
EP2 = 2, ("--expert-model-parallel-size", 2)
LAYOUTS = {
    "ep 2": EP2,
    "ep 4": (4, ("--expert-model-parallel-size", 4)),
    OVERLAP: (
        4,
        ("--expert-model-parallel-size", 2, "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "pp 2": (2, ("--pipeline-model-parallel-size", 2)),
    "pp 2, ep 2": (4, ("--pipeline-model-parallel-size", 2, "--expert-model-parallel-size", 2)),
    "tp 2, ep 2": (
        4,
        ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-model-parallel-size", 2, "--expert-tensor-parallel-size", 1),
    ),
}


@pytest.mark.parametrize("data", ["mock", "text"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_is_stocks(layout, data, text_data):
    (ranks, flags), data_flags = LAYOUTS[layout], text_data if data == "text" else MOCK_DATA
    before, ours = stock(ranks, *flags, data=data_flags), run(ranks, *flags, *OURS, "--scalemoe-table-interval", 50, data=data_flags)
    assert before.losses[50] < before.losses[1] - 0.2
    assert max(differences(before, ours)) < TOLERANCE
    assert "scalemoe: MoE layers until iteration 50" in ours.log


@pytest.mark.parametrize(
    ("layout", "options"),
    [("ep 2", ("--scalemoe-experts", "grouped")), ("ep 2", ("--scalemoe-plan", "PLAN")), (OVERLAP, ("--scalemoe-plan", "PLAN"))],
)
def test_other_experts_and_a_plan(layout, options, text_data, tmp_path):
    """At a lower learning rate: replicas add gradients in another order, and at 3e-3 a last bit may send a token elsewhere by step 35."""
    ranks, flags = LAYOUTS[layout]
    flags = (*flags, "--lr", 1e-3, "--min-lr", 1e-4)
    options = [save_some_plan(tmp_path) if option == "PLAN" else option for option in options]
    ours = run(ranks, *flags, *OURS, *options, data=text_data)
    assert max(differences(stock(ranks, *flags, data=text_data), ours)) < TOLERANCE


def test_multi_token_prediction_layers_are_ours():
    ranks, flags = EP2
    flags = (*flags, "--mtp-num-layers", 1)
    ours = run(ranks, *flags, *OURS, "--scalemoe-replicas", 2, "--scalemoe-replan-interval", 10, "--scalemoe-table-interval", 50)
    assert max(differences(stock(ranks, *flags), ours)) < TOLERANCE
    assert layers_in_table(ours.log) == [1, 2, 3]


def test_replans_and_placed_sequences(text_data):
    """Without auxiliary loss and dropout, which depend on which sequences meet on a rank; learning rate as above."""
    ranks, flags = EP2
    flags = (*flags, "--lr", 1e-3, "--min-lr", 1e-4, "--moe-aux-loss-coeff", 0, "--hidden-dropout", 0, "--attention-dropout", 0)
    live = ("--scalemoe-replicas", 2, "--scalemoe-migrate", "--scalemoe-replan-interval", 5, "--scalemoe-trace-interval", 5)
    ours = run(ranks, *flags, *OURS, *live, "--scalemoe-sequence-placement", "affinity", "--num-workers", 1, data=text_data)
    assert max(differences(stock(ranks, *flags, data=text_data), ours)) < TOLERANCE
    assert "iterations 46 to 50: rank load max/mean" in ours.log
    assert "in the last batch" in ours.log


def test_a_wrong_loss_is_noticed():
    ranks, flags = EP2
    dropping = ("--scalemoe-dispatch", "padded", "--scalemoe-padded-capacity-factor", 0.8)
    assert max(differences(stock(ranks, *flags), run(ranks, *flags, *OURS, *dropping))) > 10 * TOLERANCE


def test_hybrid_models_have_our_layers():
    """pretrain_mamba.py, without Mamba layers, which need a GPU: attention and MoE layers, each with a number of its own."""
    flags = ("--is-hybrid-model", "--hybrid-override-pattern", "*E*E", "--num-layers", 4, "--expert-model-parallel-size", 2)
    flags += ("--spec", "hybrid_spec", "hybrid_spec")
    hybrid = {"script": "pretrain_mamba.py", "modules": str(Path(__file__).parent)}
    ours = run(2, *flags, *OURS, "--scalemoe-replicas", 2, "--scalemoe-replan-interval", 10, "--scalemoe-table-interval", 50, **hybrid)
    assert max(differences(stock(2, *flags, **hybrid), ours)) < TOLERANCE
    assert layers_in_table(ours.log) == [2, 4]


def layers_in_table(log: str) -> list[int]:
    """Their numbers in the table after the last iteration."""
    rows = log.partition("until iteration 50\n")[2].splitlines()[2:]
    return [int(row.split()[0]) for row in itertools.takewhile(lambda row: row.strip()[:1].isdigit(), rows)]
