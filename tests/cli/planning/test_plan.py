"""`scalemoe plan` as a user meets it: what it finds, prints and writes, and what it says when something is wrong."""

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.cli.common import emit, print_result
from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.planning.plan import _thinned
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.environment import usable_cores
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan, save_plan
from megatron_scalemoe.topology.topology_file import load_topology, save_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace, save_trace
from tests.cost.cluster import equal_nodes, star_cluster

STABLE_KEYS = {"solver", "cost_us", "lower_bound_us", "gap", "max_over_mean", "bytes_scale_out", "seconds"}
COST = CostModel(hidden_size=64, ffn_hidden_size=32, gpu_TFLOPs=0.001)
COST_FLAGS = ["--hidden-size", "64", "--ffn-hidden-size", "32", "--gpu-tflops", "0.001"]
FILES = ["--topology", "topo.yaml", "--trace", "trace.npz"]
PLAN = ["plan", *FILES, "--time-budget", "0.3", *COST_FLAGS]
COMMAND = [sys.executable, "-m", "megatron_scalemoe.cli.main", *PLAN]


def with_trace(counts: np.ndarray, **meta: object) -> list[str]:
    save_trace(RoutingTrace(counts, meta=meta), Path("other.npz"))
    return [*PLAN, "--trace", "other.npz"]


@pytest.mark.parametrize("flags", ["--topology trace.npz --trace trace.npz", "--topology topo.yaml --trace topo.yaml"])
def test_swapped_files_are_told_by_what_they_are(flags, failure):
    kind, other = ("trace", "topology") if "topology trace.npz" in flags else ("topology", "trace")
    assert f"is a {kind}, --{other} wants a {other}" in failure("plan", *flags.split())


def test_json_has_the_stable_keys_and_the_contiguous_baseline(run_json):
    result = run_json(*PLAN)
    assert set(result) >= STABLE_KEYS
    assert (result["solver"], result["baseline"]["solver"]) == ("local_search", "contiguous")
    assert result["cost_us"] < result["baseline"]["cost_us"]
    assert result["cut"] in (False, True)
    assert sum(layer["cost_us"] for layer in result["layers"]) == pytest.approx(result["cost_us"])


def test_the_printed_costs_are_those_of_the_written_plan_on_the_links(run_json):
    result = run_json(*PLAN, "--replicas", "4", "--last-steps", "2", "-o", "plan.json")
    plan, trace, links = load_plan(Path("plan.json")), load_trace(Path("trace.npz")), Links(load_topology(Path("topo.yaml")))
    for printed, chosen in ((result, plan), (result["baseline"], PlacementPlan.contiguous(3, 4, 8))):
        layers = plan_cost(chosen, trace, links, COST, steps=slice(3, 5)).layers
        assert printed["cost_us"] == pytest.approx(sum(layer.total_us for layer in layers))
        assert printed["max_over_mean"] == pytest.approx(np.mean([layer.max_over_mean for layer in layers]))
        assert printed["max_over_mean_worst"] == pytest.approx(max(layer.max_over_mean for layer in layers))
        assert printed["bytes_scale_out"] == pytest.approx(sum(layer.bytes_scale_out for layer in layers))
        assert printed["replica_us"] == pytest.approx(sum(layer.replica_us for layer in layers))
    assert result["replicas"] == plan.num_replicas.sum() <= result["replica_slots"] == 12
    assert (result["plan"], result["plan_hash"]) == ("plan.json", plan.content_hash)


def test_the_table_shows_both_placements_and_what_was_written(run_text):
    out = run_text(*PLAN, "--replicas", "4", "-o", "plan.json")
    header, _, cost, *_ = out.splitlines()
    assert header.split() == ["contiguous", "local_search"]
    assert re.fullmatch(r"cost, all layers +\d+\.\d{3} ms +\d+\.\d{3} ms", cost)
    assert re.search(r"replicas used +0 +\d+ of 12 slots", out)
    assert out.endswith("Wrote plan.json\n")
    before = sorted(os.listdir())
    assert "Nothing was written: add -o plan.json" in run_text(*PLAN)
    assert sorted(os.listdir()) == before


def test_shared_places_all_layers_alike_and_force_replaces_the_old_plan(folder):
    Path("plan.json").write_text("old")
    assert main([*PLAN, "--shared", "-o", "plan.json", "--force"]) == 0
    slots = load_plan(Path("plan.json")).physical_to_logical
    assert len(slots) == 3 and (slots == slots[0]).all()


def test_quiet_prints_the_result_alone(folder, capsys):
    save_topology(star_cluster(equal_nodes(3, 2)), Path("six.yaml"))
    assert main([*PLAN, "--topology", "six.yaml"]) == 0
    assert "six.yaml has 6 GPUs, trace.npz 4 ranks: the first GPUs are used" in capsys.readouterr().err
    assert main([*PLAN, "--topology", "six.yaml", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "cost, all layers" in captured.out


def test_what_is_wrong_is_said_in_one_error_without_a_plan(failure):
    save_trace(RoutingTrace(np.ones((1, 1, 8, 8), dtype=int)), Path("wide.npz"))
    save_trace(RoutingTrace(np.ones((1, 1, 4, 6), dtype=int)), Path("six.npz"))
    before = sorted(os.listdir())
    for flags, message in (
        (["--topology", "none.yaml"], "none.yaml: cannot read the file"),
        (["--topology", "trace.npz"], "trace.npz is a trace, --topology wants a topology"),
        (["--trace", "topo.yaml"], "topo.yaml is a topology, --trace wants a trace"),
        (["--trace", "wide.npz"], "topo.yaml must have a GPU for each of the 8 ranks of wide.npz\n  found: 4 GPUs"),
        (["--trace", "six.npz"], "six.npz: the number of experts must be a multiple of the ranks\n  found: 6 on 4"),
        (["--replicas", "25"], "replicas must be from 0 to experts x (ranks - 1) = 24\n  found: 25"),
        (["--replicas", "-4"], "--replicas: must be 0 or more\n  found: -4"),
        (["--solver", "memtic"], "there is no such solver\n  found: 'memtic'\n  try:   contiguous, random"),
        (["--last-steps", "0"], "--last-steps: must be 1 or more"),
        (["--last-steps", "6"], "--last-steps: must be at most the 5 recorded steps"),
        (["--time-budget", "nan"], "--time-budget: must be a number of seconds above 0"),
        (["--gpu-tflops", "nan"], "--gpu-tflops: must be a finite number"),
        (["-o", "trace.npz"], "--output: trace.npz exists\n  try:   --force"),
        (["-o", "."], "--output"),
        (["-o", "none/plan.json"], "--output"),
        (["-o", "/dev/null", "--force"], "--output"),
        (["-o", 300 * "a"], "cannot write the file"),
    ):
        assert message in failure(*PLAN, *flags), flags
        assert sorted(os.listdir()) == before


@pytest.mark.parametrize("replicas", ["0", "4"])
@pytest.mark.parametrize(
    ("shape", "top", "topk"),
    [((1, 1, 4, 8), 50, 1), ((2, 1, 4, 4), 50, 4), ((3, 2, 4, 8), 1, 2), ((3, 2, 4, 8), 2, 2)],
    ids=["top-1", "all experts", "no tokens", "few tokens"],
)
def test_unusual_traces_give_valid_plans_and_finite_figures(run_json, shape, top, topk, replicas):
    counts = np.random.default_rng(0).integers(0, top, shape)
    result = run_json(*with_trace(counts, topk=topk), "--replicas", replicas, "-o", "plan.json")
    assert load_plan(Path("plan.json")).physical_to_logical.shape == (shape[1], shape[3] + int(replicas))
    figures = [result[key] for key in ("cost_us", "max_over_mean", "bytes_scale_out", "seconds")] + [result["baseline"]["cost_us"]]
    assert np.isfinite(figures).all() and min(figures) >= 0


def test_one_rank_has_nothing_to_plan(run_json):
    result = run_json(*with_trace(np.full((2, 1, 1, 4), 30)))
    assert result["cost_us"] == result["baseline"]["cost_us"] > 0
    assert (result["max_over_mean"], result["bytes_scale_out"]) == (1.0, 0.0)


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
@pytest.mark.parametrize("interrupt", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_plan_interrupted_while_being_written_leaves_the_old_one_intact(folder, capsys, monkeypatch, interrupt, moment):
    save_plan(PlacementPlan.contiguous(3, 4, 8), Path("plan.json"))
    old, write = Path("plan.json").read_bytes(), Path.write_bytes

    def half(self: Path, content: bytes | Path) -> None:
        if moment == "write_bytes":
            write(self, content[: len(content) // 2])
        raise interrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(Path, moment, half)
    code = main([*PLAN, "--solver", "greedy", "-o", "plan.json", "--force"])
    assert (code, Path("plan.json").read_bytes(), sorted(os.listdir())) == (1 if isinstance(interrupt, OSError) else 130, old, before)
    assert ("No space left on device" in capsys.readouterr().err) == isinstance(interrupt, OSError)


@pytest.mark.skipif(usable_cores() < 2, reason="one core searches without processes of its own")
def test_ctrl_c_during_the_search_ends_it_quietly_with_its_processes(folder):
    counts = np.random.default_rng(0).integers(0, 50, (2, 4, 16, 64))
    save_topology(star_cluster(equal_nodes(2, 8)), Path("big.yaml"))
    with_trace(counts)
    more = ["--trace", "other.npz", "--topology", "big.yaml", "--solver", "genetic", "--time-budget", "60", "-o", "plan.json"]
    with subprocess.Popen([*COMMAND, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 20
        while not (workers := children.read_text().split()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workers, "the search did not start"
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"", b"")
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not [name for name in os.listdir() if "plan" in name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_neither_a_closed_pipe_nor_a_full_disk_under_stdout_costs_the_plan(folder):
    """`scalemoe plan ... | head`: the pipe closes before anything is printed."""
    greedy = [*COMMAND, "--solver", "greedy", "--json", "-o", "plan.json"]
    with subprocess.Popen(greedy, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert load_plan(Path("plan.json")).num_layers == 3
    with open("/dev/full", "w") as full:
        done = subprocess.run([*greedy, "--force"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "scalemoe: error: cannot write the result to stdout")
    assert load_plan(Path("plan.json")).num_layers == 3


def test_a_closed_pipe_does_not_cost_the_json_file(tmp_path, monkeypatch):
    def closed(*args: object, **options: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    args = argparse.Namespace(json=True, output=tmp_path / "r.json", force=False)
    with pytest.raises(BrokenPipeError):
        emit(args, {"x": 1}, "")
    assert json.loads((tmp_path / "r.json").read_text()) == {"x": 1}
    with pytest.raises(BrokenPipeError):
        print_result(args, {"x": 1}, "")


@pytest.mark.parametrize("count", [1, 50, 51, 1234])
def test_a_search_is_thinned_to_fifty_points_with_the_last(count):
    points = [(i, -i) for i in range(count)]
    thinned = _thinned(tuple(points))
    assert len(thinned) <= 50
    assert thinned[-1] == points[-1]
    assert thinned == sorted(thinned)
