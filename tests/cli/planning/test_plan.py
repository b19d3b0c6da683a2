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
from megatron_scalemoe.cost.layer import plan_cost
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.environment import usable_cores
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import PlacementPlan, load_plan, save_plan
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.topology.topology_file import load_topology, save_topology
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace, save_trace
from tests.cost.cluster import equal_nodes, star_cluster
from tests.simulate.test_engine import small_trace

STABLE_KEYS = {"solver", "cost_us", "lower_bound_us", "gap", "max_over_mean", "bytes_scale_out", "seconds"}
COST = CostModel(hidden_size=64, ffn_hidden_size=32, gpu_TFLOPs=0.001)
COST_FLAGS = ["--hidden-size", "64", "--ffn-hidden-size", "32", "--gpu-tflops", "0.001"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A topology of 4 GPUs and a trace of 4 ranks, in the working directory; and flags that name them."""
    monkeypatch.chdir(tmp_path)
    save_topology(star_cluster(equal_nodes(2, 2)), Path("topo.yaml"))
    save_trace(small_trace(), Path("trace.npz"))
    return ["plan", "--topology", "topo.yaml", "--trace", "trace.npz", "--time-budget", "0.3", *COST_FLAGS]


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str) -> str:
    """What a failing command says, on stderr alone."""
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def with_trace(files: list[str], counts: np.ndarray, **meta: object) -> list[str]:
    save_trace(RoutingTrace(counts, meta=meta), Path("other.npz"))
    return [*files, "--trace", "other.npz"]


def test_json_has_the_stable_keys_and_the_contiguous_baseline(files, capsys):
    result = run_json(capsys, *files)
    assert set(result) >= STABLE_KEYS
    assert (result["solver"], result["baseline"]["solver"]) == ("memetic", "contiguous")
    assert 0 < result["lower_bound_us"] <= result["cost_us"] < result["baseline"]["cost_us"]
    assert result["gap"] == pytest.approx(result["cost_us"] / result["lower_bound_us"] - 1)
    assert sum(layer["cost_us"] for layer in result["layers"]) == pytest.approx(result["cost_us"])
    assert sum(layer["lower_bound_us"] for layer in result["layers"]) == pytest.approx(result["lower_bound_us"])


def test_the_printed_costs_are_those_of_the_written_plan_on_the_links(files, capsys):
    result = run_json(capsys, *files, "--replicas", "4", "--last-steps", "2", "-o", "plan.json")
    plan, trace, topology = load_plan(Path("plan.json")), load_trace(Path("trace.npz")), load_topology(Path("topo.yaml"))
    routes = compute_routes(topology)
    for name, chosen in (("result", plan), ("baseline", PlacementPlan.contiguous(3, 4, 8))):
        layers = [plan_cost(chosen, i, trace.layer(i, slice(3, 5)), routes, topology, COST) for i in range(3)]
        printed = result if name == "result" else result["baseline"]
        assert printed["cost_us"] == pytest.approx(sum(layer.total_us for layer in layers))
        assert printed["max_over_mean"] == pytest.approx(np.mean([layer.max_over_mean for layer in layers]))
        assert printed["max_over_mean_worst"] == pytest.approx(max(layer.max_over_mean for layer in layers))
        assert printed["bytes_scale_out"] == pytest.approx(sum(layer.bytes_scale_out for layer in layers))
    assert result["replicas"] == plan.num_replicas.sum() <= result["replica_slots"] == 12
    assert (result["plan"], result["plan_hash"]) == ("plan.json", plan.content_hash)


def test_the_plan_says_where_it_comes_from(files):
    assert main([*files, "--seed", "7", "--last-steps", "2", "--solver", "local_search", "-o", "plan.json"]) == 0
    provenance = load_plan(Path("plan.json")).provenance
    assert (provenance["solver"], provenance["seed"], provenance["steps"]) == ("local_search", 7, [3, 5, 1])
    assert provenance["trace_hash"] == load_trace(Path("trace.npz")).content_hash
    assert provenance["topology_hash"] == load_topology(Path("topo.yaml")).content_hash
    assert provenance["node_of_rank"] == load_topology(Path("topo.yaml")).node_of_rank.tolist()


def test_the_table_shows_both_placements_and_what_was_written(files, capsys):
    assert main([*files, "--replicas", "4", "-o", "plan.json"]) == 0
    out = capsys.readouterr().out
    header, _, cost, bound, gap, *_ = out.splitlines()
    assert header.split() == ["contiguous", "memetic"]
    assert re.fullmatch(r"cost, all layers +\d+\.\d{3} ms +\d+\.\d{3} ms", cost)
    assert re.fullmatch(r"lower bound +\d+\.\d{3} ms", bound)
    assert re.fullmatch(r"gap to it +\d+\.\d% +\d+\.\d%", gap)
    assert re.search(r"replicas used +0 +\d+ of 12 slots", out)
    assert out.endswith("Wrote plan.json\n")


def test_without_output_nothing_is_written_and_it_says_so(files, capsys):
    before = sorted(os.listdir())
    assert main(files) == 0
    assert "Nothing was written: add -o plan.json" in capsys.readouterr().out
    assert sorted(os.listdir()) == before


def test_the_same_seed_makes_the_same_plan_and_last_steps_another(files, capsys):
    hashes = [run_json(capsys, *files, "--solver", "random", *more)["plan_hash"] for more in ([], [], ["--seed", "1"])]
    assert hashes[0] == hashes[1] != hashes[2]
    costs = [run_json(capsys, *files, "--solver", "greedy", *more)["cost_us"] for more in ([], ["--last-steps", "1"])]
    assert costs[0] != costs[1]


def test_shared_places_all_layers_alike(files):
    assert main([*files, "--shared", "-o", "plan.json"]) == 0
    slots = load_plan(Path("plan.json")).physical_to_logical
    assert (slots == slots[0]).all()


def test_quiet_prints_the_result_alone(files, capsys):
    save_topology(star_cluster(equal_nodes(3, 2)), Path("six.yaml"))
    assert main([*files, "--topology", "six.yaml"]) == 0
    assert "six.yaml has 6 GPUs, trace.npz 4 ranks: the first GPUs are used" in capsys.readouterr().err
    assert main([*files, "--topology", "six.yaml", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "cost, all layers" in captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "none.yaml"], "none.yaml: cannot read the file\n  found: No such file"),
        (["--topology", "trace.npz"], "trace.npz: not a text file"),
        (["--trace", "topo.yaml"], "topo.yaml: not a readable npz file\n  found: a file that begins with b'schema_version: "),
        (["--replicas", "25"], "replicas must be from 0 to experts x (ranks - 1) = 24\n  found: 25"),
        (["--replicas", "-4"], "--replicas must be 0 or more\n  found: -4"),
        (["--solver", "memtic"], "there is no such solver\n  found: 'memtic'\n  try:   contiguous, random"),
        (["--last-steps", "0"], "--last-steps must be 1 or more"),
        (["--last-steps", "6"], "--last-steps must be at most the 5 recorded steps of trace.npz\n  found: 6"),
        (["--time-budget", "nan"], "--time-budget must be a number of seconds above 0"),
        (["--gpu-tflops", "nan"], "--gpu-tflops must be above 0"),
        (["-o", "trace.npz"], "--output: trace.npz exists\n  try:   --force"),
        (["-o", "."], "--output: .: must name a file"),
        (["-o", "none/plan.json"], "the directory does not exist\n  try:   mkdir -p none"),
        (["-o", "/dev/null", "--force"], "must be a regular file"),
        (["-o", 300 * "a"], "cannot write the file"),
    ],
)
def test_what_is_wrong_is_said_in_one_error_without_a_plan(files, capsys, flags, message):
    before = sorted(os.listdir())
    error = failure(capsys, *files, *flags)
    assert error.startswith("scalemoe: error: ")
    assert message in error
    assert sorted(os.listdir()) == before


def test_a_trace_of_more_ranks_than_gpus_is_refused(files, capsys):
    error = failure(capsys, *with_trace(files, np.ones((1, 1, 8, 8), dtype=int)))
    assert "topo.yaml must have a GPU for each of the 8 ranks of other.npz\n  found: 4 GPUs" in error


def test_experts_that_do_not_divide_by_the_ranks_are_refused(files, capsys):
    error = failure(capsys, *with_trace(files, np.ones((1, 1, 4, 6), dtype=int)))
    assert "other.npz: the number of experts must be a multiple of the ranks\n  found: 6 on 4" in error


@pytest.mark.parametrize("replicas", ["0", "4"])
@pytest.mark.parametrize(
    ("shape", "top", "topk"),
    [((1, 1, 4, 8), 50, 1), ((2, 1, 4, 4), 50, 4), ((3, 2, 4, 8), 1, 2), ((3, 2, 4, 8), 2, 2)],
    ids=["top-1", "all experts", "no tokens", "few tokens"],
)
def test_unusual_traces_give_valid_plans_and_finite_figures(files, capsys, shape, top, topk, replicas):
    counts = np.random.default_rng(0).integers(0, top, shape)
    result = run_json(capsys, *with_trace(files, counts, topk=topk), "--replicas", replicas, "-o", "plan.json")
    assert load_plan(Path("plan.json")).physical_to_logical.shape == (shape[1], shape[3] + int(replicas))
    figures = [result[key] for key in STABLE_KEYS - {"solver", "gap"}] + [result["baseline"]["cost_us"]]
    assert np.isfinite([*figures, result["gap"]]).all()
    assert min(figures) >= 0


def test_one_rank_has_nothing_to_plan(files, capsys):
    result = run_json(capsys, *with_trace(files, np.full((2, 1, 1, 4), 30)))
    assert result["cost_us"] == result["baseline"]["cost_us"] > 0
    assert (result["gap"], result["max_over_mean"], result["bytes_scale_out"]) == (pytest.approx(0, abs=1e-5), 1.0, 0.0)


def test_force_replaces_the_old_plan(files):
    Path("plan.json").write_text("old")
    assert main([*files, "-o", "plan.json", "--force"]) == 0
    assert load_plan(Path("plan.json")).num_layers == 3


@pytest.mark.parametrize("moment", ["write_bytes", "replace"])
@pytest.mark.parametrize("interrupt", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_plan_interrupted_while_being_written_leaves_the_old_one_intact(files, capsys, monkeypatch, interrupt, moment):
    save_plan(PlacementPlan.contiguous(3, 4, 8), Path("plan.json"))
    old, write = Path("plan.json").read_bytes(), Path.write_bytes

    def half(self: Path, content: bytes | Path) -> None:
        if moment == "write_bytes":
            write(self, content[: len(content) // 2])
        raise interrupt

    before = sorted(os.listdir())
    monkeypatch.setattr(Path, moment, half)
    code = main([*files, "-o", "plan.json", "--force"])
    assert (code, Path("plan.json").read_bytes(), sorted(os.listdir())) == (1 if isinstance(interrupt, OSError) else 130, old, before)
    assert ("No space left on device" in capsys.readouterr().err) == isinstance(interrupt, OSError)


@pytest.mark.skipif(usable_cores() < 2, reason="one core searches without processes of its own")
def test_ctrl_c_during_the_search_ends_it_quietly_with_its_processes(files):
    counts = np.random.default_rng(0).integers(0, 50, (2, 4, 16, 64))
    save_topology(star_cluster(equal_nodes(2, 8)), Path("big.yaml"))
    more = ["--topology", "big.yaml", "--solver", "genetic", "--time-budget", "60", "-o", "plan.json"]
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", *with_trace(files, counts), *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
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


def test_a_reader_that_has_seen_enough_costs_no_plan(files):
    """`scalemoe plan ... | head`: the pipe closes before anything is printed."""
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", *files, "--json", "-o", "plan.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
    assert load_plan(Path("plan.json")).num_layers == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_an_error_not_a_traceback(files):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "megatron_scalemoe.cli.main", *files, "-o", "plan.json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("count", [1, 2, 50, 51, 1234])
def test_a_search_is_thinned_to_fifty_points_with_the_last(count):
    points = [(i, -i) for i in range(count)]
    thinned = _thinned(tuple(points))
    assert len(thinned) <= 50
    assert thinned[-1] == points[-1]
    assert thinned == sorted(thinned)


def test_a_plan_for_another_trace_is_refused_by_the_loader_of_plans(files, capsys):
    save_plan(PlacementPlan.contiguous(2, 4, 8), Path("two.json"))
    with pytest.raises(ScaleMoEError, match="not a text file"):
        load_plan(Path("trace.npz"))
    error = failure(capsys, "compare", *files[1:], "--plans", "two.json")
    assert "two.json, with trace.npz: the plan must be for the 3 layers, 4 ranks and 8 experts of the trace\n  found: 2 layers" in error
