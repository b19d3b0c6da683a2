"""A working directory with `topo.yaml` (4 GPUs on 2 nodes), `trace.npz` (4 ranks, no co-activation); and ways to run commands there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.topology.topology_file import save_topology
from megatron_scalemoe.traffic.trace import save_trace
from tests.cost.cluster import equal_nodes, star_cluster
from tests.simulate.test_engine import small_trace


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_topology(star_cluster(equal_nodes(2, 2)), tmp_path / "topo.yaml")
    save_trace(small_trace(), tmp_path / "trace.npz")
    return tmp_path


@pytest.fixture
def run_json(folder, capsys) -> Callable[..., dict]:
    """What a command prints with --json."""

    def run(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def run_text(folder, capsys) -> Callable[..., str]:
    """What a command prints."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def failure(folder, capsys) -> Callable[..., str]:
    """What a failing command says, on stderr alone, and in one error."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("scalemoe: error: ")
        return captured.err

    return run
