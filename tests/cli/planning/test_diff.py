"""`scalemoe diff` as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.topology.builders.fabrics import rail_optimized
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import save_trace

LAYERS, RANKS, EXPERTS = 3, 4, 16


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Plans `old`, `new` (balanced, one replica), a trace and a topology, in the current directory."""
    trace = synthesize("zipf", ranks=RANKS, experts=EXPERTS, layers=LAYERS, topk=2, steps=2, tokens_per_rank=256, seed=0)
    save_trace(trace, tmp_path / "trace.npz")
    save_topology(rail_optimized(nodes=2, gpus_per_node=2), tmp_path / "topo.yaml")
    save_plan(PlacementPlan.contiguous(LAYERS, RANKS, EXPERTS), tmp_path / "old.json")
    home_rank = PlacementPlan.contiguous(LAYERS, RANKS, EXPERTS).home_rank
    for layer in range(1, LAYERS):  # snake by load; layer 0 stays
        order = np.argsort(-trace.counts[:, layer].sum(axis=(0, 1)), kind="stable")
        home_rank[layer, order] = np.tile([0, 1, 2, 3, 3, 2, 1, 0], 2)
    hosts = home_rank[:, :, None] == np.arange(RANKS)
    hosts[2, 0] = [True, True, False, False]
    hosts[2, 0, home_rank[2, 0]] = True
    save_plan(PlacementPlan.from_hosts(home_rank, hosts, replica_slots_per_rank=1), tmp_path / "new.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def diff(capsys, *arguments: str) -> dict:
    assert main(["diff", "old.json", "new.json", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_moves_are_counted_by_layer_and_in_all(folder, capsys):
    result = diff(capsys, "--hidden-size", "64", "--ffn-hidden-size", "32")
    layers, total = result["layers"], result["total"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert layers[0]["homes_moved"] == layers[0]["rounds"] == 0
    assert 0 < layers[1]["homes_moved"] <= EXPERTS
    assert [layer["replicas_added"] for layer in layers][:2] == [0, 0]
    assert layers[2]["replicas_added"] in (1, 2)
    assert total["homes_moved"] == layers[1]["homes_moved"] + layers[2]["homes_moved"]
    assert total["bytes"] == total["homes_moved"] * 14 * 3 * 64 * 32
    assert "migration_us" not in total


def test_the_trace_adds_balance_and_the_topology_time(folder, capsys):
    balance = diff(capsys, "--trace", "trace.npz")
    assert balance["total"]["max_over_mean_new"] < balance["total"]["max_over_mean_old"]
    assert balance["layers"][0]["max_over_mean_new"] == balance["layers"][0]["max_over_mean_old"]
    assert "cost_us_old" not in balance["total"]
    assert diff(capsys, "--topology", "topo.yaml")["total"]["migration_us"] > 0


def test_both_add_the_cost_and_the_advice(folder, capsys):
    total = diff(capsys, "--topology", "topo.yaml", "--trace", "trace.npz", "--ffn-hidden-size", "16", "--hidden-size", "4096")["total"]
    assert total["cost_us_old"] > 0
    assert total["homes_moved_if_aligned"] <= total["homes_moved"]
    assert total["replan"] == (total["reason"].count("pays back") == 1 and "but" not in total["reason"])


def test_the_horizon_decides(folder, capsys):
    arguments = ("--topology", "topo.yaml", "--trace", "trace.npz", "--gpu-tflops", "20")
    assert not diff(capsys, *arguments, "--horizon", "1")["total"]["replan"]
    assert diff(capsys, *arguments, "--horizon", "1000000")["total"]["replan"]


def test_people_see_a_table_of_the_layers_that_change(folder, capsys):
    assert main(["diff", "old.json", "new.json", "--topology", "topo.yaml", "--trace", "trace.npz"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert "2 of 3 layers change." in out
    assert "Max/mean rank load:" in out
    assert "orth moving: saves" in out


def test_equal_plans_are_said_to_be_equal(folder, capsys):
    assert main(["diff", "old.json", "old.json"]) == 0
    assert capsys.readouterr().out == "0 of 3 layers change.\n"


def test_the_result_is_written_to_a_file(folder, capsys):
    result = diff(capsys, "-o", "diff.json")
    assert json.loads((folder / "diff.json").read_text()) == result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["old.json", "missing.json"], "missing.json: cannot read"),
        (["old.json", "wide.json"], "old.json and wide.json: the new plan must be for"),
        (["wide.json", "wide.json", "--trace", "trace.npz"], "trace.npz and wide.json must be for the same"),
        (["large.json", "large.json", "--topology", "topo.yaml"], "topo.yaml must have a GPU for each rank of large.json"),
        (["old.json", "new.json", "--horizon", "0"], "--horizon"),
        (["old.json", "new.json", "--hidden-size", "0"], "--hidden-size must be 1 or more"),
    ],
)
def test_bad_input_is_named(folder, capsys, arguments, words):
    save_plan(PlacementPlan.contiguous(LAYERS, RANKS, 2 * EXPERTS), folder / "wide.json")
    save_plan(PlacementPlan.contiguous(LAYERS, 8, EXPERTS), folder / "large.json")
    assert main(["diff", *arguments]) == 1
    assert words in capsys.readouterr().err
