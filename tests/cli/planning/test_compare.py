"""`scalemoe compare` as a user meets it: every policy judged alike, the contiguous placement first."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.traffic.trace import RoutingTrace, save_trace
from tests.simulate.test_engine import SUMMARY_KEYS, plan_with_replicas, small_trace

STABLE_KEYS = {"policy", "cost_us", "lower_bound_us", "gap", "seconds", *SUMMARY_KEYS.split()}
INPUTS = ["--topology", "topo.yaml", "--trace", "trace.npz"]
COST = ["--hidden-size", "64", "--ffn-hidden-size", "32", "--gpu-tflops", "0.001", "--micro-batches", "64"]


COMPARE = ["compare", *INPUTS, "--time-budget", "0.3", *COST]


def policies(result: dict) -> list[str]:
    return [row["policy"] for row in result["rows"]]


def test_by_default_the_baseline_comes_first_and_the_exact_solver_last_where_it_can(folder, capsys):
    save_trace(RoutingTrace(small_trace().counts[:2, :1]), Path("top1.npz"))
    assert main([*COMPARE, "--trace", "top1.npz", "--json", "-o", "result.json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert policies(result) == ["contiguous", "random", "greedy", "hierarchical", "genetic", "local_search", "exact"]
    assert captured.err == ""
    assert json.loads(Path("result.json").read_text()) == result
    exact = result["rows"][-1]["cost_us"]
    for row in result["rows"]:
        assert set(row) >= STABLE_KEYS
        assert row["cost_us"] >= exact * (1 - 1e-9), row["policy"]
        assert row["gap"] is None or row["lower_bound_us"] <= row["cost_us"] * (1 + 1e-9), row["policy"]


def test_what_the_exact_solver_cannot_do_is_a_note_unless_it_was_asked_for(folder, capsys, failure):
    assert main([*COMPARE, "--json"]) == 0
    captured = capsys.readouterr()
    assert policies(json.loads(captured.out)) == ["contiguous", "random", "greedy", "hierarchical", "genetic", "local_search"]
    assert captured.err.startswith("scalemoe: note: no exact solution: the exact solver needs co-activation")
    assert main([*COMPARE, "--json", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert "the exact solver needs co-activation" in failure(*COMPARE, "--policies", "exact")


def test_the_chosen_policies_are_compared_once_each_with_the_baseline(run_json):
    result = run_json(*COMPARE, "--policies", "greedy", "contiguous", "random", "greedy", "--replicas", "4")
    assert policies(result) == ["contiguous", "greedy", "random"]
    assert (result["replicas"], result["split"]) == (4, "balanced")


def test_a_plan_costs_in_compare_what_it_costs_in_plan_and_simulate(run_json):
    planned = run_json("plan", *COMPARE[1:], "--replicas", "4", "-o", "plan.json")
    simulated = run_json("simulate", *INPUTS, *COST, "--plan", "plan.json")
    row = run_json(*COMPARE, "--policies", "contiguous", "--plans", "plan.json")["rows"][1]
    assert row["policy"] == "plan.json"
    assert {key: row[key] for key in SUMMARY_KEYS.split()} == {key: simulated[key] for key in SUMMARY_KEYS.split()}
    assert row["cost_us"] == pytest.approx(planned["cost_us"])


def test_a_plan_file_named_like_a_solver_takes_no_ones_place(run_json):
    plan = plan_with_replicas(1)
    for name in ("contiguous", "greedy"):
        save_plan(plan, Path(f"{name}.json"))
        os.rename(f"{name}.json", name)
    rows = run_json(*COMPARE, "--policies", "greedy", "--plans", "contiguous", "greedy")["rows"]
    assert [row["policy"] for row in rows] == ["contiguous", "greedy", "contiguous", "greedy"]
    assert [row["replica_us"] > 0 for row in rows] == [False, False, True, True]


def test_even_split_is_never_better_balanced(run_json):
    save_plan(plan_with_replicas(1), Path("plan.json"))
    arguments = [*COMPARE, "--policies", "contiguous", "--plans", "plan.json"]
    balanced, even = (run_json(*arguments, "--split", split)["rows"][1] for split in ("balanced", "even"))
    assert even["max_over_mean_mean"] > balanced["max_over_mean_mean"]


def test_replanning_leaves_the_warm_up_out_of_every_row(run_json, run_text):
    result = run_json(*COMPARE, "--policies", "greedy", "--replan-every", "2", "--replan-lag", "2")
    assert [(row["steps"], row["warm_up_steps"]) for row in result["rows"]] == [(3, 2), (3, 2)]
    assert [row["replans"] > 0 for row in result["rows"]] == [False, True]
    text = run_text(*COMPARE, "--policies", "greedy", "--replan-lag", "2")
    assert "The first 2 recorded steps, before the first plan, are left out." in text


def test_the_table_names_the_fastest_and_has_a_line_for_each_policy(run_text):
    save_plan(PlacementPlan.contiguous(3, 4, 8), Path("plan.json"))
    out = run_text(*COMPARE, "--policies", "local_search", "--plans", "plan.json")
    header, _, *rows = out.split("\n\n")[0].splitlines()
    assert header.split()[:3] == ["policy", "step", "ms"]
    assert [row.split()[0] for row in rows] == ["contiguous", "local_search", "plan.json"]
    assert [float(row.split()[2].rstrip("x")) > 1 for row in rows] == [False, True, False]
    assert re.search(r"Fastest: local_search, 1\.\d\dx the speed of contiguous\.", out)


@pytest.mark.parametrize("topk", [1, 2])
def test_a_trace_without_tokens_is_compared_too(run_json, run_text, topk):
    save_trace(RoutingTrace(np.zeros((2, 2, 4, 8), dtype=int), meta={"topk": topk}), Path("zero.npz"))
    out = run_text(*COMPARE, "--trace", "zero.npz", "--policies", "random", "local_search", "--replicas", "4")
    assert "Fastest: contiguous, 1.00x" in out
    rows = run_json(*COMPARE, "--trace", "zero.npz", "--policies", "random")["rows"]
    assert [(row["step_us"], row["gap"], row["max_over_mean_p95"]) for row in rows] == [(0, 0, 1), (0, 0, 1)]


def test_what_is_wrong_is_said_in_one_error(failure):
    save_plan(PlacementPlan.contiguous(2, 4, 8), Path("two.json"))
    two = "two.json must be for the 3 layers, 4 ranks and 8 experts of trace.npz\n  found: 2 layers"
    for flags, message in (
        (["--policies", "greedy", "magic"], "there is no such solver\n  found: 'magic'"),
        (["--plans", "none.json"], "none.json: cannot read the file"),
        (["--plans", "topo.yaml"], "topo.yaml is a topology, --plans wants a plan"),
        (["--plans", "trace.npz"], "trace.npz is a trace, --plans wants a plan"),
        (["--plans", "two.json"], two),
        (["--replan-lag", "5"], "lag 5, 5 recorded steps"),
        (["--replan-lag", "-1"], "--replan-lag: must be 0 or more"),
        (["--replan-every", "0"], "--replan-every: must be 1 or more"),
        (["--replicas", "25"], "replicas must be from 0 to experts x (ranks - 1) = 24"),
        (["--time-budget", "0"], "--time-budget: must be a number of seconds above 0"),
        (["--overlap", "nan"], "--overlap: must be"),
        (["-o", "topo.yaml"], "--output: topo.yaml exists"),
    ):
        assert message in failure(*COMPARE, *flags)


def test_a_wrong_choice_of_split_is_a_usage_error(folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*COMPARE, "--split", "uneven"])
    assert "invalid choice: 'uneven'" in capsys.readouterr().err
