"""`scalemoe bench dispatch`: what it refuses, what it asks of the ranks, and what it makes of their answer."""

import json

import pytest

from megatron_scalemoe.cli import train_extra
from megatron_scalemoe.cli.bench import command as bench
from megatron_scalemoe.cli.main import main


def row(dispatcher: str, **changes) -> dict:
    values = {
        "dispatcher": dispatcher,
        "transport": "collective",
        "ranks": 2,
        "dtype": "fp32",
        "median_ms": 12.345,
        "p90_ms": 15.0,
        "bytes_out": 1 << 20,
        "ratio_to_stock": 0.5,
        "max_rel_error": 1e-7,
    }
    return {**values, **changes}


@pytest.fixture
def fake_ranks(monkeypatch):
    """Replaces the launch: the ranks' rows are set by the test, and their command lines are recorded."""
    calls = []

    def answer_with(rows, **more):
        def result_of_ranks(module, arguments, **kwargs):
            calls.append((module, arguments, kwargs))
            return {"rows": rows, **more}

        monkeypatch.setattr(bench, "result_of_ranks", result_of_ranks)
        monkeypatch.setattr(bench, "require_train_extra", lambda command: None)
        return calls

    return answer_with


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("dispatch --tokens 0", "--tokens: must be 1 or more"),
        ("dispatch --skew nan", "--skew: must be"),
        ("dispatch --timeout inf", "--timeout: must be"),
        ("dispatch --topk 9", "--topk: cannot exceed --experts"),
        ("dispatch --ranks 3", "--experts: must be a multiple of --ranks"),
        ("kernels --topk 9", "--topk: cannot exceed --experts"),
        ("kernels --threads 0", "--threads: must be 1 or more"),
        ("kernels --sizes 1 inf", "--sizes: must be"),
        ("kernels --skews 0 -1", "--skews: must be 0 or more"),
        ("live --ranks 1", "--ranks: must be 2 or more"),
        ("live --experts 10", "--experts: must be a multiple of --ranks"),
        ("live --replicas 6", "--replicas: must be a multiple of --ranks"),
        ("live --refresh 60", "--refresh: must be less than --steps"),
    ],
)
def test_impossible_numbers_are_user_errors(command, message, capsys, fake_ranks):
    calls = fake_ranks([])
    assert main(["bench", *command.split()]) == 1
    assert message in capsys.readouterr().err
    assert calls == []


def test_an_existing_output_is_refused_before_anything_runs(tmp_path, capsys, fake_ranks):
    calls = fake_ranks([row("alltoall")])
    path = tmp_path / "r.json"
    path.write_text("old")
    assert main(["bench", "dispatch", "-o", str(path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert calls == []
    assert path.read_text() == "old"


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(train_extra, "installed_version", lambda name: None if name == "psutil" else "1")
    assert main(["bench", "dispatch"]) == 1
    assert "not installed: psutil" in capsys.readouterr().err


def test_the_ranks_get_every_flag_and_the_baseline(fake_ranks, capsys):
    calls = fake_ranks([row("alltoall"), row("scalemoe")])
    assert main(["bench", "dispatch", "--tokens", "64", "--dtype", "bf16", "--dispatchers", "scalemoe", "--timeout", "9", "--quiet"]) == 0
    module, arguments, kwargs = calls[0]
    assert module == "megatron_scalemoe.bench.dispatch"
    assert kwargs == {"ranks": 2, "timeout": 9.0, "quiet": True}
    words = " ".join(arguments)
    assert words.endswith(" --dispatchers alltoall scalemoe")
    assert {"--tokens 64", "--hidden 1024", "--experts 8", "--dtype bf16", "--skew 1.0", "--warmup 3", "--timeout 9.0"} <= flags_in(words)


def flags_in(words: str) -> set[str]:
    return {f"--{flag}".strip() for flag in words.split("--")}


def test_nothing_is_measured_twice(fake_ranks):
    calls = fake_ranks([row("alltoall")])
    flags = ["--dispatchers", "padded", "alltoall", "padded", "--transport", "collective", "shm", "collective"]
    assert main(["bench", "dispatch", *flags, "--quiet"]) == 0
    assert " ".join(calls[0][1]).endswith("--dispatchers alltoall padded --transport collective shm")


def test_the_table_says_what_bytes_do_not_count_and_that_transports_agree(fake_ranks, capsys):
    fake_ranks([row("alltoall"), row("scalemoe"), row("scalemoe", transport="shm", bytes_out=0)], transports_same_bits=True)
    assert main(["bench", "dispatch"]) == 0
    *_, shm, bytes_note, bits_note = capsys.readouterr().out.splitlines()
    assert shm.split()[:2] == ["scalemoe", "shm"]
    assert "rows that go through shared memory or our CUDA kernels are not counted" in bytes_note
    assert "the same bits" in bits_note


def test_transports_that_disagree_fail_the_check(fake_ranks, capsys):
    fake_ranks([row("alltoall"), row("scalemoe"), row("scalemoe", transport="shm")], transports_same_bits=False)
    assert main(["bench", "dispatch"]) == 3
    assert "check failed: scalemoe's results depend on the transport" in capsys.readouterr().err


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_result_fails_the_check(error, fake_ranks, capsys):
    fake_ranks([row("alltoall"), row("scalemoe", max_rel_error=error)])
    assert main(["bench", "dispatch"]) == 3
    captured = capsys.readouterr()
    assert "check failed: scalemoe (collective) differ from alltoall" in captured.err
    assert "dispatcher" in captured.out


@pytest.mark.parametrize(
    "text",
    [
        '{"rows": [{}]}',
        '{"rows": []}',
        '{"rows": [1]}',
        "{}",
        '{"rows": 3}',
        json.dumps({"rows": [row("alltoall", median_ms="x")]}),
        json.dumps({"rows": [row("alltoall", dtype="fp8")]}),
        json.dumps({"rows": [row("alltoall")]}).replace("12.345", "1e999"),
        json.dumps({"rows": [row("alltoall")], "env": 3}),
    ],
)
def test_a_damaged_result_is_a_user_error(text, tmp_path, capsys):
    path = tmp_path / "ranks.json"
    path.write_text(text)
    assert main(["bench", "dispatch", "--result", str(path)]) == 1
    assert f"error: {path}:1: " in capsys.readouterr().err


def test_numbers_that_json_has_no_words_for_are_null(tmp_path, capsys):
    path = tmp_path / "ranks.json"
    text = json.dumps({"rows": [row("alltoall"), row("scalemoe", max_rel_error=None)], "more": 7.5}).replace("7.5", "1e999")
    path.write_text(text)
    assert main(["bench", "dispatch", "--result", str(path), "--json"]) == 3
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result["more"] is None


def test_a_result_of_ranks_started_elsewhere_is_shown_and_checked(tmp_path, capsys):
    """As examples/slurm/bench.sbatch does."""
    result = tmp_path / "ranks.json"
    result.write_text(json.dumps({"rows": [row("alltoall", ranks=32, ratio_to_stock=1.0), row("scalemoe", ranks=32)]}))
    assert main(["bench", "dispatch", "--result", str(result), "-o", str(tmp_path / "bench.json")]) == 0
    assert "scalemoe" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["rows"][1]["ranks"] == 32
    result.write_text(json.dumps({"rows": [row("alltoall", dtype="bf16"), row("scalemoe", dtype="bf16", max_rel_error=0.1)]}))
    assert main(["bench", "dispatch", "--result", str(result)]) == 3
    assert "scalemoe (collective) differ from alltoall by more than 0.01" in capsys.readouterr().err
