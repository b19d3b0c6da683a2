import argparse
import dataclasses
import json
import re

import numpy as np
import pytest

from megatron_scalemoe.cli.common import add_output_flags
from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.planning.cost_flags import add_cost_flags, cost_from_args
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan, save_plan
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.trace import save_trace
from tests.cost.cluster import equal_nodes, star_cluster
from tests.simulate.test_engine import SUMMARY_KEYS, plan_with_replicas, small_trace


@pytest.fixture
def files(tmp_path):
    """Flags that name a topology of 6 GPUs and a trace of 4 ranks."""
    save_topology(star_cluster(equal_nodes(3, 2)), tmp_path / "topo.yaml")
    save_trace(small_trace(), tmp_path / "trace.npz")
    save_plan(plan_with_replicas(1), tmp_path / "plan.json")
    return ["simulate", "--topology", f"{tmp_path}/topo.yaml", "--trace", f"{tmp_path}/trace.npz"]


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_json_has_the_stable_keys_of_the_plan_and_of_the_contiguous_baseline(files, tmp_path, capsys):
    result = run_json(capsys, *files, "--plan", f"{tmp_path}/plan.json")
    assert set(SUMMARY_KEYS.split()) <= set(result)
    assert (result["policy"], result["baseline"]["policy"]) == ("plan.json", "contiguous")
    assert (result["layers"], result["ranks"], result["steps"]) == (3, 4, 5)
    assert result["speedup"] == pytest.approx(result["baseline"]["step_us"] / result["step_us"])
    assert result["replica_us"] > 0 == result["baseline"]["replica_us"]


def test_without_a_plan_it_is_the_contiguous_placement(files, capsys):
    result = run_json(capsys, *files)
    assert (result["policy"], result["speedup"]) == ("contiguous", 1.0)
    assert {key: result[key] for key in result["baseline"]} == result["baseline"]
    assert main(files) == 0
    output = capsys.readouterr().out
    assert output.split()[:2] == ["contiguous", "------------------------"]
    assert "To compare: --plan FILE, or --replicas 4" in output


def test_a_plan_of_the_contiguous_placement_is_as_fast_as_it(files, tmp_path, capsys):
    save_plan(PlacementPlan.contiguous(3, 4, 8), tmp_path / "contiguous")
    assert main([*files, "--plan", f"{tmp_path}/contiguous"]) == 0
    output = capsys.readouterr().out
    assert output.split()[:2] == ["contiguous", "contiguous"]
    assert "As fast as the contiguous placement" in output


def test_the_table_has_both_policies_and_says_what_it_means(files, tmp_path, capsys):
    assert main([*files, "--plan", f"{tmp_path}/plan.json", "--gpu-tflops", "0.001"]) == 0
    captured = capsys.readouterr()
    header, *_ = captured.out.splitlines()
    assert header.split() == ["contiguous", "plan.json"]
    assert re.search(r"^step +\d+\.\d{3} ms +\d+\.\d{3} ms$", captured.out, re.MULTILINE)
    assert re.search(r"\d\.\d\dx (faster than|the speed of) the contiguous placement: max/mean rank load \d", captured.out)
    assert "has 6 GPUs" in captured.err and "first GPUs are used" in captured.err


def test_split_even_waits_longer_than_balanced(files, tmp_path, capsys):
    plan = ["--plan", f"{tmp_path}/plan.json"]
    balanced = run_json(capsys, *files, *plan)
    even = run_json(capsys, *files, *plan, "--split", "even")
    assert even["max_over_mean_mean"] > balanced["max_over_mean_mean"]


def test_a_solver_plans_once_from_the_whole_trace(files, capsys):
    result = run_json(capsys, *files, "--solver", "greedy", "--replicas", "4", "--time-budget", "1")
    assert (result["policy"], result["replans"], result["warm_up_steps"]) == ("greedy + 4 replicas", 0, 0)
    assert result["max_over_mean_mean"] < result["baseline"]["max_over_mean_mean"]


def test_replanning_leaves_the_warm_up_out_of_both_policies(files, capsys):
    result = run_json(capsys, *files, "--solver", "greedy", "--replan-every", "2", "--replan-lag", "2", "--time-budget", "0.2")
    assert result["policy"] == "greedy, every 2, lag 2"
    assert (result["steps"], result["warm_up_steps"], result["baseline"]["warm_up_steps"]) == (3, 2, 2)
    assert result["replans"] >= 1 and result["migrated_bytes"] > 0


def test_a_trace_without_a_token_takes_no_time_and_is_no_error(files, tmp_path, capsys):
    trace = small_trace()
    save_trace(dataclasses.replace(trace, counts=0 * trace.counts), tmp_path / "trace.npz", force=True)
    result = run_json(capsys, *files, "--plan", f"{tmp_path}/plan.json")
    assert (result["baseline"]["step_us"], result["wait_share"], result["max_over_mean_p95"]) == (0, 0, 1)
    assert result["step_us"] == pytest.approx(result["replica_us"])


def test_one_rank_has_nothing_to_exchange(tmp_path, capsys):
    save_topology(star_cluster([(0, 0)]), tmp_path / "topo.yaml")
    save_trace(small_trace(ranks=1), tmp_path / "trace.npz")
    flags = ["--topology", f"{tmp_path}/topo.yaml", "--trace", f"{tmp_path}/trace.npz", "--exchange", "2dh"]
    result = run_json(capsys, "simulate", *flags)
    assert (result["dispatch_us"], result["bytes_scale_up"], result["max_over_mean_mean"]) == (0, 0, 1)
    assert result["step_us"] == pytest.approx(result["compute_us"])


def test_timeline_is_written_and_not_overwritten(files, tmp_path, capsys):
    path = tmp_path / "timeline.json"
    assert main([*files, "--timeline", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    assert {e["tid"] for e in events if e["ph"] == "X"} == {0, 1, 2, 3}
    capsys.readouterr()
    assert "exists" in failure(capsys, *files, "--timeline", str(path))


def test_output_file_holds_what_json_prints(files, tmp_path, capsys):
    result = run_json(capsys, *files, "-o", f"{tmp_path}/result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_topology_too_small_is_an_error_that_names_both_files(files, tmp_path, capsys):
    save_topology(star_cluster(equal_nodes(1, 2)), tmp_path / "topo.yaml", force=True)
    message = failure(capsys, *files)
    assert "topo.yaml" in message and "trace.npz" in message and "found: 2 GPUs" in message


def test_a_plan_for_another_trace_is_an_error_that_names_both_files(files, tmp_path, capsys):
    save_plan(PlacementPlan.contiguous(2, 4, 8), tmp_path / "other.json")
    message = failure(capsys, *files, "--plan", f"{tmp_path}/other.json")
    assert "other.json" in message and "trace.npz" in message and "2 layers, 4 ranks, 8 experts" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--plan", "p.json", "--replan-every", "2"], "--replan-every makes a plan"),
        (["--replan-lag", "-1"], "--replan-lag must be 0 or more"),
        (["--replan-every", "0"], "--replan-every must be 1 or more"),
        (["--replan-lag", "5"], "lag 5, 5 recorded steps"),
        (["--time-budget", "nan", "--solver", "greedy"], "--time-budget must be"),
        (["--overlap", "nan"], "--overlap must be from 0 to 1"),
        (["--hidden-size", "0"], "--hidden-size must be 1 or more"),
        (["--gpu-tflops", "inf"], "--gpu-tflops must be above 0"),
        (["--calibration", "missing.json"], "missing.json: cannot read"),
        (["--solver", "best"], "best"),
        (["--trace", "missing.npz"], "missing.npz: cannot read"),
        (["--topology", "missing.yaml"], "missing.yaml: cannot read"),
    ],
)
def test_bad_flags_are_user_errors_that_name_the_flag(files, capsys, flags, expected):
    assert expected in failure(capsys, *files, *flags)


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
    with pytest.raises(ScaleMoEError, match="meta: hidden_size must be an integer"):
        cost_of(meta={"hidden_size": "big"})


def test_calibration_sets_the_overhead_unless_it_is_given_and_tells_the_fit(tmp_path, capsys):
    rows = [{"dispatcher": "scalemoe", "ranks": 1, "bytes_out": b, "median_ms": (40 + b / 1e3) / 1e3} for b in (4e3, 4e6)]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    flags = ["--calibration", f"{tmp_path}/bench.json"]
    np.testing.assert_allclose(cost_of(*flags).exchange_overhead_us, 10.0)
    assert "10.0 us + a rank's bytes / 1 GB/s, 2 points, worst 0% off" in capsys.readouterr().err
    assert cost_of(*flags, "--exchange-overhead-us", "3").exchange_overhead_us == 3.0
