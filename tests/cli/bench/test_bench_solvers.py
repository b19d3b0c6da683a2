import json

import pytest

from megatron_scalemoe.cli.main import main

SMALL = ["bench", "solvers", "--ranks", "4", "--nodes", "2", "--experts", "8", "--seeds", "2", "--time-budget", "0.2"]


def test_every_solver_stands_beside_contiguous_from_the_same_run(tmp_path, capsys):
    assert main([*SMALL, "--solvers", "local_search", "greedy", "--quiet", "-o", str(tmp_path / "r.json")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["contiguous", "local_search", "greedy"]
    result = json.loads((tmp_path / "r.json").read_text())
    rows = {row["solver"]: row for row in result["rows"]}
    assert list(rows) == ["contiguous", "local_search", "greedy"]
    assert rows["contiguous"]["ratio_to_contiguous"] == 1
    found = rows["local_search"]
    assert found["cost_us"] < rows["contiguous"]["cost_us"]
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert all(run["gap"] is None or run["lower_bound_us"] <= run["cost_us"] for row in result["rows"] for run in row["runs"])
    assert result["env"]["command"][0] == "scalemoe"


def test_progress_goes_to_stderr(capsys):
    assert main([*SMALL, "--solvers", "greedy"]) == 0
    assert "seed 1: 2 of 2 layers placed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "--seeds: must be 1 or more"),
        (["--ranks", "5"], "--ranks: must be a multiple of --nodes"),
        (["--experts", "9"], "--experts: must be a multiple of --ranks"),
        (["--time-budget", "nan"], "--time-budget: must be"),
        (["--solvers", "magic"], "no such solver"),
        (["--kind", "none"], "kind: must be one of"),
        (["--replicas", "99"], "replicas must be from 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    assert main([*SMALL, *flags]) == 1
    assert message in capsys.readouterr().err
