"""`scalemoe bench split`: what it measures, and what it refuses."""

import json

import pytest

from megatron_scalemoe.cli.main import main

SIZES = {"ranks": 8, "nodes": 2, "experts": 16, "topk": 2, "replicas": 8, "seeds": 2, "iters": 3}
SMALL = ["bench", "split", *(part for name, value in SIZES.items() for part in (f"--{name}", str(value)))]


def test_the_balanced_split_is_timed_beside_the_even_one_and_balances_better(tmp_path, capsys):
    assert main([*SMALL, "--skew", "1.2", "-o", str(tmp_path / "r.json")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["even", "balanced"]
    result = json.loads((tmp_path / "r.json").read_text())
    even, balanced = result["rows"]
    assert [even["split"], balanced["split"]] == ["even", "balanced"]
    assert 1 <= balanced["max_over_mean"] < even["max_over_mean"]
    assert 0 < balanced["median_ms"] <= balanced["p90_ms"]
    assert {"command", "date", "cpu"} <= set(result["env"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iters", "0"], "--iters: must be 1 or more"),
        (["--nodes", "3"], "--ranks: must be a multiple of --nodes"),
        (["--experts", "12"], "--experts: must be a multiple of --ranks"),
        (["--replicas", "-1"], "--replicas: must be 0 or more"),
        (["--skew", "-1"], "--skew: must be"),
    ],
)
def test_impossible_numbers_are_user_errors(flags, message, capsys):
    assert main([*SMALL, *flags]) == 1
    assert message in capsys.readouterr().err
