"""`scalemoe topology`: what a user types, and what they see."""

import json

import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.topology import command as cli
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.topology_file import load_topology


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main(["topology", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line_names_every_builder():
    assert set(cli.BUILDERS) == set(BUILDERS)


def test_build_writes_a_file_that_loads(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    code, out, err = run(capsys, "build", "rail_optimized", "--nodes", 8, "--gpus-per-node", 4, "-o", path, "--override", "node3:0.5")
    assert (code, err) == (0, "")
    assert out == f"{path}: rail_optimized, 32 ranks on 8 nodes (16 switch, 32 gpu, 32 nic; 224 links)\n"
    topology = load_topology(path)
    assert (topology.parameters["nodes"], topology.parameters["gpus_per_node"]) == (8, 4)
    assert topology.graph.edges["node3/nic0", "group0/rail0"]["bandwidth_GBps"] == 25


@pytest.mark.parametrize("builder", cli.BUILDERS)
def test_every_builder_builds(capsys, tmp_path, builder):
    path = tmp_path / "topo.yaml"
    assert run(capsys, "build", builder, "-o", path)[0] == 0
    assert load_topology(path).builder == builder


def test_build_without_output_prints_the_yaml(capsys, tmp_path):
    code, out, _ = run(capsys, "build", "torus", "--dims", 2, 3, 4)
    (tmp_path / "t.yaml").write_text(out)
    assert code == 0
    assert load_topology(tmp_path / "t.yaml").num_ranks == 24


def test_flags_may_stand_before_the_builder(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    assert run(capsys, "build", "-o", path, "--quiet", "ring", "--gpus", 5)[:2] == (0, "")
    assert load_topology(path).num_ranks == 5
    assert run(capsys, "build", "-o", path, "ring")[0] == 1
    assert run(capsys, "build", "-o", path, "--force", "ring")[0] == 0
    assert load_topology(path).num_ranks == 8


def test_build_json_is_a_summary(capsys):
    code, out, _ = run(capsys, "build", "p4d", "--network-Gbps", 50, "--override", "node0:25GBps", "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["parameters"] == {"nodes": 4, "network_Gbps": 50.0}
    assert summary["overrides"] == [{"target": "node0", "scale": None, "bandwidth_GBps": 25.0}]
    assert (summary["num_ranks"], summary["vertices"]["gpu"]) == (32, 32)


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["build"], ["build", "nonsense"], ["build", "ring", "--nodes", "3"], ["build", "ring", "--gpus", "x"], ["show"]],
)
def test_wrong_usage_exits_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "usage: scalemoe topology" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "ring", "--gpus", "0"], "parameters.gpus: must be an integer, 1 or more"),
        (["build", "ring", "--override", "node0"], "--override must be TARGET:VALUE"),
        (["build", "ring", "--override", "node0:fast"], "node3:25GBps"),
        (["build", "ring", "--override", "node7:0.5"], "no link matches"),
        (["build", "ring", "--override", "node0/gpu0:-1"], "above 0"),
        (["build", "ring", "-o", "/nonexistent/t.yaml"], "does not exist"),
        (["show", "/nonexistent/t.yaml"], "cannot read"),
        (["check", "/nonexistent/t.yaml"], "cannot read"),
    ],
)
def test_a_user_error_exits_1(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err


def test_show_prints_pair_classes_and_nodes(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    run(capsys, "build", "p4d", "--override", "node3:0.5", "-o", path)
    code, out, _ = run(capsys, "show", path, "-o", tmp_path / "show.json")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["override:", "node3", "x", "0.5"] in lines
    assert ["between", "nodes", "768", "10", "6.25", "-", "12.5", "0", "->", "8"] in lines
    assert ["3", "8", "300", "6.25", "6.25"] in lines
    result = json.loads((tmp_path / "show.json").read_text())
    assert [row["pairs"] for row in result["pair_classes"]] == [224, 768]


def test_show_json_has_null_where_nothing_limits(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    run(capsys, "build", "dgx_h100", "-o", path)
    result = json.loads(run(capsys, "show", path, "--json")[1], parse_constant=pytest.fail)
    assert result["node_classes"][0]["node_GBps"] is None


def test_check_exits_3_and_says_what_it_found(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    run(capsys, "build", "fully_connected", "--override", "node0/gpu3:0.05", "-o", path)
    code, out, _ = run(capsys, "check", path)
    assert code == 3
    assert "14 found  slow link" in out
    assert "slow link: and 9 more (--json lists all)" in out
    result = json.loads(run(capsys, "check", path, "--json")[1])
    assert (result["ok"], len(result["findings"])) == (False, 16)


def test_check_of_a_cut_cluster_exits_3_and_names_the_pair(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    path.write_text("schema_version: 1\nvertices: [{name: a, kind: gpu, node: 0}, {name: b, kind: gpu, node: 0}]\nlinks: []\n")
    code, out, _ = run(capsys, "check", path)
    assert code == 3
    assert "a cannot reach b" in out
    assert out.count("not run") == 5
    assert run(capsys, "show", path)[0] == 1
