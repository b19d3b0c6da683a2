"""`scalemoe diff` as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan, save_plan
from megatron_scalemoe.topology.builders.fabrics import rail_optimized
from megatron_scalemoe.topology.topology_file import load_topology, save_topology
from megatron_scalemoe.traffic.synthetic import synthesize
from megatron_scalemoe.traffic.trace import load_trace, save_trace

LAYERS, RANKS, EXPERTS = 3, 4, 16
DIFF = ("diff", "old.json", "new.json")


BOTH = ("--topology", "topo.yaml", "--trace", "trace.npz")


@pytest.fixture(autouse=True)
def plans(folder) -> None:
    """Plans `old`, `new` (balanced, one replica), a trace and a topology, in the current directory."""
    trace = synthesize("zipf", ranks=RANKS, experts=EXPERTS, layers=LAYERS, topk=2, steps=2, tokens_per_rank=256, seed=0)
    save_trace(trace, folder / "trace.npz", force=True)
    save_topology(rail_optimized(nodes=2, gpus_per_node=2), folder / "topo.yaml", force=True)
    save_plan(PlacementPlan.contiguous(LAYERS, RANKS, EXPERTS), folder / "old.json")
    home_rank = PlacementPlan.contiguous(LAYERS, RANKS, EXPERTS).home_rank
    for layer in range(1, LAYERS):  # snake by load; layer 0 stays
        order = np.argsort(-trace.counts[:, layer].sum(axis=(0, 1)), kind="stable")
        home_rank[layer, order] = np.tile([0, 1, 2, 3, 3, 2, 1, 0], 2)
    hosts = home_rank[:, :, None] == np.arange(RANKS)
    hosts[2, 0] = [True, True, False, False]
    hosts[2, 0, home_rank[2, 0]] = True
    save_plan(PlacementPlan.from_hosts(home_rank, hosts, replica_slots_per_rank=1), folder / "new.json")


def test_moves_are_counted_by_layer_and_in_all(run_json):
    result = run_json(*DIFF, "--hidden-size", "64", "--ffn-hidden-size", "32")
    layers, total = result["layers"], result["total"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2]
    assert layers[0]["homes_moved"] == layers[0]["rounds"] == 0
    assert 0 < layers[1]["homes_moved"] <= EXPERTS
    assert [layer["replicas_added"] for layer in layers][:2] == [0, 0]
    assert layers[2]["replicas_added"] in (1, 2)
    assert total["homes_moved"] == layers[1]["homes_moved"] + layers[2]["homes_moved"]
    assert total["bytes"] == total["homes_moved"] * 14 * 3 * 64 * 32
    assert total["rounds"] == layers[1]["rounds"] + layers[2]["rounds"] > 0
    assert "migration_us" not in total
    back = run_json("diff", "new.json", "old.json")["total"]
    assert (back["replicas_removed"], back["replicas_added"]) == (total["replicas_added"], 0)


def test_the_trace_adds_balance_and_the_topology_time(run_json):
    balance = run_json(*DIFF, "--trace", "trace.npz")
    assert balance["total"]["max_over_mean_new"] < balance["total"]["max_over_mean_old"]
    assert balance["layers"][0]["max_over_mean_new"] == balance["layers"][0]["max_over_mean_old"]
    assert "cost_us_old" not in balance["total"]
    assert run_json(*DIFF, "--topology", "topo.yaml")["total"]["migration_us"] > 0


def test_both_add_the_cost_and_the_advice_which_the_horizon_decides(run_json):
    total = run_json(*DIFF, *BOTH, "--ffn-hidden-size", "16", "--hidden-size", "4096")["total"]
    assert total["cost_us_old"] > 0
    assert total["homes_moved_if_aligned"] <= total["homes_moved"]
    assert total["replan"] == (total["reason"].count("pays back") == 1 and "but" not in total["reason"])
    assert not run_json(*DIFF, *BOTH, "--gpu-tflops", "20", "--horizon", "1")["total"]["replan"]
    assert run_json(*DIFF, *BOTH, "--gpu-tflops", "20", "--horizon", "1000000")["total"]["replan"]
    # A step of many micro-batches saves as much as many steps of one.
    assert run_json(*DIFF, *BOTH, "--gpu-tflops", "20", "--horizon", "1", "--micro-batches", "1000000")["total"]["replan"]


def test_costs_are_those_of_plan_cost_layer_by_layer(run_json):
    result = run_json(*DIFF, *BOTH, "--micro-batches", "4", "-o", "diff.json")
    assert json.loads(Path("diff.json").read_text()) == result
    links, trace = Links(load_topology(Path("topo.yaml"))), load_trace(Path("trace.npz"))
    cost = CostModel(micro_batches=4)
    for name in ("old", "new"):
        priced = plan_cost(load_plan(Path(f"{name}.json")), trace, links, cost)
        assert [layer[f"cost_us_{name}"] for layer in result["layers"]] == pytest.approx([layer.total_us for layer in priced.layers])
        assert result["total"][f"cost_us_{name}"] == pytest.approx(priced.total_us)
        assert result["total"][f"max_over_mean_{name}"] == pytest.approx(np.mean(priced.max_over_mean))


def test_people_see_a_table_of_the_layers_that_change(run_text):
    out = run_text(*DIFF, *BOTH)
    rows = [line.split() for line in out.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["1", "2"]
    assert "2 of 3 layers change." in out
    assert "Max/mean rank load:" in out
    assert "orth moving: saves" in out
    assert run_text("diff", "old.json", "old.json") == "0 of 3 layers change.\n"


def test_bad_input_is_named(failure):
    save_plan(PlacementPlan.contiguous(LAYERS, RANKS, 2 * EXPERTS), Path("wide.json"))
    save_plan(PlacementPlan.contiguous(LAYERS, 8, EXPERTS), Path("large.json"))
    for arguments, words in (
        (["old.json", "missing.json"], "missing.json: cannot read"),
        (["old.json", "wide.json"], "the new plan must be for"),
        (["wide.json", "wide.json", "--trace", "trace.npz"], "wide.json must be for the 3 layers"),
        (["large.json", "large.json", "--topology", "topo.yaml"], "topo.yaml must have a GPU for each of the 8 ranks of large.json"),
        (["old.json", "new.json", "--horizon", "0"], "--horizon"),
        (["old.json", "new.json", "--hidden-size", "0"], "--hidden-size: must be 1 or more"),
    ):
        assert words in failure("diff", *arguments)
