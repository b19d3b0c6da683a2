"""docs/formats.md: each of its examples goes through the reader of its format, and what it says of them is true."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.plan.placement_plan import load_plan
from megatron_scalemoe.report.collect import collect
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.graph import Override
from megatron_scalemoe.topology.topology_file import load_topology
from megatron_scalemoe.traffic.trace import load_trace
from tests.simulate.test_engine import SUMMARY_KEYS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Of each kind of result, the keys that scripts may rely on.
PLAN_KEYS = "solver cost_us lower_bound_us gap max_over_mean bytes_scale_out seconds"
ROW_KEYS = {
    "plan result": PLAN_KEYS,
    "simulate": "step_us dispatch_us combine_us compute_us max_over_mean_mean max_over_mean_p95",
    "compare": f"policy {SUMMARY_KEYS} cost_us lower_bound_us gap seconds",
    "bench dispatch": "dispatcher transport ranks dtype median_ms p90_ms bytes_out ratio_to_stock max_rel_error",
    "bench solvers": "solver cost_us gap seconds",
}


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


@pytest.fixture
def run(tmp_path):
    """The JSON examples as the report's collector finds them in a directory, beside the directory itself."""
    for number, text in enumerate(blocks("json")):
        (tmp_path / f"{number}.json").write_text(text)
    return tmp_path, collect(tmp_path)


def test_every_json_example_is_recognised_and_has_the_stable_keys(run):
    directory, found = run
    assert (found.damaged, found.unrecognised) == ([], [])
    assert sorted(row.kind for row in found.files) == sorted(["plan", "timeline", *ROW_KEYS])
    for kind, keys in ROW_KEYS.items():
        [result] = found.results[kind]
        content = json.loads((directory / result.name).read_text())
        for row in content.get("rows", [content]):
            assert set(keys.split()) <= set(row), kind
        section = PAGE.split(f"### {kind.removesuffix(' result')}\n")[1].split("\n#")[0]
        if "**" in section:
            assert set(keys.split()) <= set(re.findall(r"\*\*`(\w+)`\*\*", section)), kind


def test_the_plan_example_keeps_the_rules_that_the_page_states(run):
    directory, found = run
    [(name, plan)] = found.plans.items()
    assert (plan.num_ranks, plan.slots_per_rank, plan.homes_per_rank) == (4, 3, 2)
    slots = plan.physical_to_logical
    head = f"{plan.num_ranks} {plan.num_logical_experts} ({slots.shape[0]}, {slots.shape[1]})"
    digest = hashlib.sha256(head.encode() + slots.astype("<i4").tobytes()).hexdigest()
    assert digest == plan.content_hash
    assert f'"plan_hash": "{digest}"' in PAGE
    content = json.loads((directory / name).read_text())
    assert content["home"] == plan.home.tolist()
    del content["home"], content["provenance"]
    (directory / "short.json").write_text(json.dumps(content))
    assert load_plan(directory / "short.json").content_hash == digest


def test_the_topology_examples_load_with_their_overrides(tmp_path):
    short, full = blocks("yaml")
    (tmp_path / "short.yaml").write_text(short)
    (tmp_path / "full.yaml").write_text(full)
    built = build_topology("rail_optimized", {"nodes": 2, "gpus_per_node": 2}).overridden(Override("node1", scale=0.5))
    assert load_topology(tmp_path / "short.yaml").content_hash == built.content_hash
    topology = load_topology(tmp_path / "full.yaml")
    assert (topology.num_ranks, topology.num_nodes, topology.name) == (2, 2, "two machines")
    assert topology.graph.edges["gpu1", "switch"]["bandwidth_GBps"] == 12.5
    assert topology.graph.edges["switch", "gpu1"]["bandwidth_GBps"] == 25


def test_the_lines_that_write_a_trace_write_a_valid_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [lines] = blocks("python")
    exec(compile(lines, "docs/formats.md", "exec"), {})
    trace = load_trace(tmp_path / "trace.npz")
    assert (trace.counts.shape, trace.topk, trace.iterations) == ((4, 2, 4, 8), 2, [0, 10, 20, 30])
    np.testing.assert_array_equal(trace.layer(0).counts, 100)
