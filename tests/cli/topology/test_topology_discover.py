"""`scalemoe topology discover` and `measure`: what a user types, and what they see."""

import json
from pathlib import Path

import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.topology import discover as cli
from megatron_scalemoe.topology.discover.layout import GPU_MODELS
from megatron_scalemoe.topology.topology_file import load_topology

SAMPLES = Path(__file__).parents[2] / "topology" / "discover" / "samples"
DGX, A6000, XML = (SAMPLES / name for name in ("nvidia_smi_dgx_h100.txt", "nvidia_smi_pcie_a6000.txt", "nccl_dgx_h100.xml"))
TREE, RAILS = SAMPLES / "slurm_tree.conf", SAMPLES / "slurm_rails.conf"


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        code = main(["topology", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def probe(rates: dict[tuple[int, int], float], latency_us: float = 4.0) -> dict:
    sizes = [1000, 10**6, 10**8]
    pairs = [
        {"source": i, "destination": j, "bytes": sizes, "time_us": [latency_us + size / (rate * 1e3) for size in sizes]}
        for (i, j), rate in rates.items()
    ]
    return {"pairs": pairs, "node_of_rank": [0] * (1 + max(map(max, rates))), "backend": "nccl", "device": "made up"}


@pytest.fixture
def probe_file(tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(probe({(0, 1): 20.0, (1, 0): 10.0})))
    return path


@pytest.fixture
def fake_ranks(monkeypatch):
    """Replaces the launch; its command lines are recorded."""
    calls = []

    def run_ranks(module, arguments, **kwargs):
        calls.append((module, arguments, kwargs))
        rates = {(i, j): 5.0 for i in range(kwargs["ranks"]) for j in range(kwargs["ranks"]) if i != j}
        Path(arguments[arguments.index("--result-file") + 1]).write_text(json.dumps(probe(rates)))

    monkeypatch.setattr(cli, "run_ranks", run_ranks)
    return calls


def test_times_that_cannot_be_fitted_are_a_user_error(tmp_path, capsys):
    pairs = [{"source": a, "destination": 1 - a, "bytes": [1024, 2048, 4096], "time_us": [1.0, 1e-308, 3.0]} for a in (0, 1)]
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({"pairs": pairs, "node_of_rank": [0, 0], "backend": "gloo", "device": "cpu"}))
    assert main(["topology", "measure", "--probe", str(path)]) == 1
    assert f"error: {path}" in capsys.readouterr().err


def test_the_command_line_names_every_gpu_model():
    assert set(cli.GPU_MODELS) == set(GPU_MODELS)


def test_discover_writes_a_file_that_loads_and_tells_its_assumptions(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    code, out, err = run(capsys, "discover", "--nvidia-smi", DGX, "-o", path)
    assert code == 0
    assert out == f"{path}: nvidia_smi_dgx_h100, 8 ranks on 1 node (8 gpu, 8 nic, 9 switch, 2 node; 66 links)\n"
    assert err == "note: nvidia-smi does not tell how fast NICs are: taken 400 Gb/s each (--nic-Gbps sets it)\n"
    assert load_topology(path).num_ranks == 8


def test_a_discovered_cluster_shows_and_checks(capsys, tmp_path):
    path = tmp_path / "topo.yaml"
    assert run(capsys, "discover", "--nvidia-smi", DGX, "--slurm", RAILS, "-o", path)[0] == 0
    assert "between nodes" in run(capsys, "show", path)[1]
    code, out, _ = run(capsys, "check", path)
    assert (code, out.count("\nok ")) == (0, 6)


def test_the_jobs_hosts_in_their_order(capsys, tmp_path):
    flags = ["--slurm", TREE, "--hosts", "dgx[006,002]", "--nic-Gbps", 100, "--json", "-o", tmp_path / "t.yaml"]
    code, out, err = run(capsys, "discover", "--nvidia-smi", DGX, *flags)
    result = json.loads(out)
    assert code == 0
    assert result["hosts"] == ["dgx006", "dgx002"]
    assert result["num_nodes"] == 2
    assert [f"note: {note}" for note in result["notes"]] == err.splitlines()
    assert not any("--nic-Gbps" in note for note in result["notes"]), "the user said it"
    edges = load_topology(tmp_path / "t.yaml").graph.edges
    assert edges["node0/nic0", "leaf2"]["bandwidth_GBps"] == 12.5


def test_a_built_node_can_be_the_layout(capsys, tmp_path):
    node = tmp_path / "node.yaml"
    run(capsys, "build", "p4d", "--nodes", 1, "-o", node)
    code, out, _ = run(capsys, "discover", "--node", node, "--slurm", SAMPLES / "slurm_block.conf", "--json", "--oversubscription", 3)
    assert code == 0
    assert json.loads(out)["num_ranks"] == 96


def test_the_gpu_model_sets_nvlink(capsys, tmp_path):
    run(capsys, "discover", "--nvidia-smi", A6000, "--gpu-model", "a6000", "-o", tmp_path / "t.yaml")
    assert load_topology(tmp_path / "t.yaml").graph.edges["node0/gpu0", "node0/gpu1"]["bandwidth_GBps"] == 56.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["discover", "--nvidia-smi", "/nonexistent"], "/nonexistent: cannot read"),
        (["discover", "--nvidia-smi", XML], "nccl_dgx_h100.xml:1: no matrix"),
        (["discover", "--nccl-xml", DGX], "nvidia_smi_dgx_h100.txt:1: not valid XML"),
        (["discover", "--nccl-xml", XML, "--slurm", DGX], "nvidia_smi_dgx_h100.txt:1: expected"),
        (["discover", "--nccl-xml", XML, "--hosts", "a"], "belong to a fabric"),
        (["discover", "--nccl-xml", XML, "--gpu-model", "h100"], "belongs to --nvidia-smi"),
        (["discover", "--nccl-xml", XML, "--nic-Gbps", "0"], "--nic-Gbps must be"),
        (["discover", "--nccl-xml", XML, "--nic-Gbps", "nan"], "--nic-Gbps must be"),
        (["discover", "--nccl-xml", XML, "--slurm", TREE, "--hosts", "dgx001,x1"], "not there: x1"),
        (["discover", "--nccl-xml", XML, "--slurm", TREE, "--hosts", "dgx[001"], "expected a"),
        (["discover", "--nccl-xml", XML, "-o", "/nonexistent/t.yaml"], "does not exist"),
        (["measure", "--ranks", "1"], "--ranks must be 2 or more"),
        (["measure", "--sizes", "1024"], "--sizes must be two or more"),
        (["measure", "--sizes", "0", "8"], "--sizes must be two or more"),
        (["measure", "--iters", "0"], "--iters must be 1 or more"),
        (["measure", "--timeout", "nan"], "--timeout must be"),
        (["measure", "--probe", "/nonexistent"], "cannot read"),
        (["measure", "--topology", "/nonexistent"], "cannot read"),
    ],
)
def test_a_user_error_exits_1(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err


@pytest.mark.parametrize("arguments", [["discover"], ["discover", "--nvidia-smi", DGX, "--nccl-xml", XML], ["measure", "--ranks", "x"]])
def test_wrong_usage_exits_2(capsys, arguments):
    assert run(capsys, *arguments)[:2] == (2, "")


def test_measure_prints_fits_with_residuals_the_slowest_first(capsys, tmp_path, probe_file):
    path = tmp_path / "topo.yaml"
    code, out, _ = run(capsys, "measure", "--probe", probe_file, "-o", path)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][:3] == ["2", "ranks,", "nccl;"]
    assert lines[-2] == ["1", "->", "0", "10", "4", "1.000", "+0%", "+0%", "+0%"]
    assert lines[-1][:4] == ["0", "->", "1", "20"]
    topology = load_topology(path)
    assert topology.graph.edges["node0/gpu1", "node0/gpu0"]["bandwidth_GBps"] == pytest.approx(10)
    assert topology.graph.edges["node0/gpu1", "node0/gpu0"]["latency_us"] == pytest.approx(4)


def test_measure_corrects_a_topology(capsys, tmp_path, probe_file):
    model, path = tmp_path / "model.yaml", tmp_path / "topo.yaml"
    run(capsys, "build", "fully_connected", "--gpus", 2, "--link-GBps", 20, "-o", model)
    code, out, _ = run(capsys, "measure", "--probe", probe_file, "--topology", model, "-o", path, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["overrides"] == 1
    row = next(row for row in result["pairs"] if row["source"] == 1)
    assert (row["modelled_GBps"], row["corrected_GBps"], row["bandwidth_GBps"]) == pytest.approx((20, 10, 10))
    assert load_topology(path).overrides[0].target == "node0/gpu1->node0/gpu0"
    assert "modelled GB/s" in run(capsys, "measure", "--probe", probe_file, "--topology", model)[1]


def test_many_pairs_are_cut_to_the_slowest(capsys, fake_ranks):
    code, out, _ = run(capsys, "measure", "--ranks", 6, "--sizes", 1024, 64, 1024)
    assert code == 0
    assert "and 10 faster pairs" in out
    module, arguments, kwargs = fake_ranks[0]
    assert (module, kwargs["ranks"]) == (cli.WORKER, 6)
    assert arguments[arguments.index("--sizes") + 1 :][:2] == ["64", "1024"]


def test_measure_json_has_the_environment(capsys, fake_ranks):
    result = json.loads(run(capsys, "measure", "--json")[1])
    assert result["num_ranks"] == 2
    assert result["env"]["command"][0] == "scalemoe"
    assert len(result["pairs"][0]["residuals"]) == len(result["pairs"][0]["bytes"])
