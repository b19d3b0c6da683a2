"""`scalemoe bench kernels`: what it measures, and what it refuses."""

import json

import pytest

from megatron_scalemoe.cli.bench import kernels as bench_kernels
from megatron_scalemoe.cli.main import main

SMALL = ["bench", "kernels", "--sizes", "0.1", "--skews", "1.2", "--hidden", "64", "--iters", "2", "--warmup", "0", "--quiet"]
OPS = ["permute", "permute backward", "unpermute", "unpermute backward"]
CONTENDERS = ["scalemoe", "torch", "megatron"]


def test_every_op_by_every_contender(capsys):
    pytest.importorskip("megatron.core")
    assert main([*SMALL, "--experts", "6", "--topk", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["dtype"], row["op"], row["by"]) for row in result["rows"]] == [
        (dtype, op, by) for dtype in ("fp32", "bf16") for op in OPS for by in CONTENDERS
    ]
    for row in result["rows"]:
        item_bytes = 4 if row["dtype"] == "fp32" else 2
        tokens = int(0.1 * (1 << 20)) // (3 * 64 * item_bytes)
        assert row["bytes_permuted"] == tokens * 3 * 64 * item_bytes
        assert row["gb_per_s"] == pytest.approx(tokens * 4 * 64 * item_bytes / row["median_ms"] / 1e6)
        assert 0 < row["median_ms"] <= row["p90_ms"]
        assert row["max_rel_error"] <= (1e-6 if row["dtype"] == "fp32" else 2e-2)
    assert all(
        row["max_rel_error"] == 0 for row in result["rows"] if row["by"] == "megatron" or row["op"] in ("permute", "unpermute backward")
    )
    assert {"command", "cpu", "device", "threads", "native", "scalemoe_is_native"} <= set(result["env"])


def row(**changes) -> dict:
    values = {"op": "permute", "dtype": "bf16", "bytes_permuted": 1 << 20, "skew": 0.0, "by": "scalemoe", "median_ms": 1.25, "p90_ms": 2}
    return {**values, "gb_per_s": 30, "of_warm_copy": 0.9, "of_fresh_copy": 1.5, "max_rel_error": 0.0, **changes}


def test_the_table_says_what_scalemoe_was():
    env = {"device": "cpu", "scalemoe_is_native": False, "native": {"cpu": "there was no compiler"}}
    lines = bench_kernels.format_result({"rows": [row()], "env": env}).splitlines()
    assert lines[2].split() == ["permute", "bf16", "1.0", "MiB", "0", "scalemoe", "1.25", "2.00", "30.00", "0.90", "1.50", "0.0e+00"]
    assert lines[3] == "scalemoe is plain torch here, not native: there was no compiler"
    env["scalemoe_is_native"] = True
    assert "plain torch" not in bench_kernels.format_result({"rows": [row()], "env": env})


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_another_result_fails_the_check(error, capsys, monkeypatch):
    module = pytest.importorskip("megatron_scalemoe.bench.kernels")
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: [row(by="torch", max_rel_error=error)])
    assert main(SMALL) == 3
    assert "check failed: torch (permute, bf16) differ from megatron" in capsys.readouterr().err
