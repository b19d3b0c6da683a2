import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cli.common import add_output_flags
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.trace import save_trace
from tests.cost.cluster import star_cluster
from tests.simulate.test_engine import SUMMARY_KEYS, plan_with_replicas, small_trace

SIMULATE = ["simulate", "--topology", "topo.yaml", "--trace", "trace.npz"]


@pytest.fixture(autouse=True)
def plan(folder) -> None:
    save_plan(plan_with_replicas(1), folder / "plan.json")


def test_json_has_the_stable_keys_of_the_plan_and_of_the_contiguous_baseline(run_json):
    result = run_json(*SIMULATE, "--plan", "plan.json")
    assert set(SUMMARY_KEYS.split()) <= set(result)
    assert (result["policy"], result["baseline"]["policy"]) == ("plan.json", "contiguous")
    assert (result["layers"], result["ranks"], result["steps"]) == (3, 4, 5)
    assert result["speedup"] == pytest.approx(result["baseline"]["step_us"] / result["step_us"])
    assert result["replica_us"] > 0 == result["baseline"]["replica_us"]


def test_without_a_plan_it_is_the_contiguous_placement(run_json, run_text):
    result = run_json(*SIMULATE)
    assert (result["policy"], result["speedup"]) == ("contiguous", 1.0)
    assert {key: result[key] for key in result["baseline"]} == result["baseline"]
    output = run_text(*SIMULATE)
    assert output.split()[:2] == ["contiguous", "------------------------"]
    assert "To compare: --plan FILE, or --replicas 4" in output


def test_a_plan_of_the_contiguous_placement_is_as_fast_as_it(run_text):
    save_plan(PlacementPlan.contiguous(3, 4, 8), Path("contiguous"))
    output = run_text(*SIMULATE, "--plan", "contiguous")
    assert output.split()[:2] == ["contiguous", "contiguous"]
    assert "As fast as the contiguous placement" in output


def test_split_even_waits_longer_than_balanced(run_json):
    plan = ["--plan", "plan.json"]
    balanced = run_json(*SIMULATE, *plan)
    even = run_json(*SIMULATE, *plan, "--split", "even")
    assert even["max_over_mean_mean"] > balanced["max_over_mean_mean"]


def test_a_solver_plans_once_from_the_whole_trace(run_json):
    result = run_json(*SIMULATE, "--solver", "greedy", "--replicas", "4", "--time-budget", "1")
    assert (result["policy"], result["replans"], result["warm_up_steps"]) == ("greedy + 4 replicas", 0, 0)
    assert result["max_over_mean_mean"] < result["baseline"]["max_over_mean_mean"]


def test_replanning_leaves_the_warm_up_out_of_both_policies(run_json):
    result = run_json(*SIMULATE, "--solver", "greedy", "--replan-every", "2", "--replan-lag", "2", "--time-budget", "0.2")
    assert result["policy"] == "greedy, every 2, lag 2"
    assert (result["steps"], result["warm_up_steps"], result["baseline"]["warm_up_steps"]) == (3, 2, 2)
    assert result["replans"] >= 1 and result["migrated_bytes"] > 0


def test_a_trace_without_a_token_takes_no_time_and_is_no_error(run_json):
    trace = small_trace()
    save_trace(dataclasses.replace(trace, counts=0 * trace.counts), Path("trace.npz"), force=True)
    result = run_json(*SIMULATE, "--plan", "plan.json")
    assert (result["baseline"]["step_us"], result["wait_share"], result["max_over_mean_p95"]) == (0, 0, 1)
    assert result["step_us"] == pytest.approx(result["replica_us"])


def test_one_rank_has_nothing_to_exchange(run_json):
    save_topology(star_cluster([(0, 0)]), Path("topo.yaml"), force=True)
    save_trace(small_trace(ranks=1), Path("trace.npz"), force=True)
    result = run_json(*SIMULATE, "--exchange", "2dh")
    assert (result["dispatch_us"], result["bytes_scale_up"], result["max_over_mean_mean"]) == (0, 0, 1)
    assert result["step_us"] == pytest.approx(result["compute_us"])


def test_timeline_is_written_and_not_overwritten(run_text, failure):
    run_text(*SIMULATE, "--timeline", "timeline.json")
    events = json.loads(Path("timeline.json").read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2, 3}
    assert "exists" in failure(*SIMULATE, "--timeline", "timeline.json")


def test_what_is_wrong_is_said_in_one_error(failure):
    save_plan(PlacementPlan.contiguous(2, 4, 8), Path("other.json"))
    for flags, expected in (
        (["--plan", "p.json", "--replan-every", "2"], "--replan-every makes a plan"),
        (["--plan", "other.json"], "other.json must be for the 3 layers"),
        (["--replan-lag", "5"], "lag 5, 5 recorded steps"),
        (["--time-budget", "nan", "--solver", "greedy"], "--time-budget: must be"),
        (["--hidden-size", "0"], "--hidden-size: must be 1 or more"),
        (["--gpu-tflops", "inf"], "--gpu-tflops: must be"),
        (["--calibration", "missing.json"], "missing.json: cannot read"),
        (["--solver", "best"], "best"),
    ):
        assert expected in failure(*SIMULATE, *flags)


def cost_of(*flags: str, meta: dict | None = None) -> CostModel:
    parser = argparse.ArgumentParser()
    add_cost_flags(parser)
    add_output_flags(parser)
    return cost_from_args(parser.parse_args(list(flags)), meta)


def test_cost_flags_default_to_the_cost_models_own_values():
    assert cost_of() == CostModel()


def test_every_field_of_the_cost_model_has_a_flag():
    flags = "--hidden-size 8 --ffn-hidden-size 9 --no-gated --bytes-per-value 4 --gpu-tflops 2 --micro-batches 3 --exchange 1dh"
    rest = "--no-deduplicate --overlap 0.5 --exchange-overhead-us 7"
    expected = CostModel(
        hidden_size=8,
        ffn_hidden_size=9,
        gated=False,
        bytes_per_value=4,
        gpu_TFLOPs=2.0,
        micro_batches=3,
        exchange="1dh",
        deduplicate=False,
        overlap=0.5,
        exchange_overhead_us=7.0,
    )
    assert cost_of(*flags.split(), *rest.split()) == expected


def test_the_traces_sizes_count_unless_flags_say_otherwise():
    meta = {"hidden_size": 768, "ffn_hidden_size": 3072, "topk": 2}
    assert (cost_of(meta=meta).hidden_size, cost_of(meta=meta).ffn_hidden_size) == (768, 3072)
    assert cost_of("--hidden-size", "5", meta=meta).hidden_size == 5
    with pytest.raises(ScaleMoEError, match="meta: hidden_size: must be an integer"):
        cost_of(meta={"hidden_size": "big"})


def test_calibration_sets_the_overhead_unless_it_is_given_and_tells_the_fit(tmp_path, capsys):
    rows = [{"dispatcher": "scalemoe", "ranks": 1, "bytes_out": b, "median_ms": (40 + b / 1e3) / 1e3} for b in (4e3, 4e6)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    flags = ["--calibration", f"{tmp_path}/bench.json"]
    np.testing.assert_allclose(cost_of(*flags).exchange_overhead_us, 10.0)
    assert "10.0 us + a rank's bytes / 1 GB/s, 2 points, worst 0% off" in capsys.readouterr().err
    assert cost_of(*flags, "--exchange-overhead-us", "3").exchange_overhead_us == 3.0
