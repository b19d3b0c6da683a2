"""`scalemoe trace` as a user meets it."""

import json
from pathlib import Path

import pytest

from megatron_scalemoe.cli.main import main
from megatron_scalemoe.cli.trace import KINDS
from megatron_scalemoe.traffic.synthetic import DEFAULTS
from megatron_scalemoe.traffic.trace import load_trace


def scalemoe(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = main([str(a) for a in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_synth_writes_a_trace_and_says_what_it_is(capsys, tmp_path):
    path = tmp_path / "trace.npz"
    shape = ["--ranks", 4, "--experts", 16, "--layers", 3, "--topk", 4, "--skew", 0.8, "--drift", 0.05, "--steps", 6]
    code, out, err = scalemoe(capsys, "trace", "synth", *shape, "--tokens-per-rank", 100, "--seed", 7, "-o", path)
    assert code == 0
    assert out.startswith(f"{path}: 6 steps, 3 layers, 4 ranks, 16 experts, top-4, 400 tokens per step, with co-activation\n\nlayer  gini")
    assert err.startswith(f"{path}: written in ")
    trace = load_trace(path)
    assert trace.counts.shape == (6, 3, 4, 16)
    assert trace.meta["seed"] == 7
    again = tmp_path / "again.npz"
    scalemoe(capsys, "trace", "synth", *shape, "--tokens-per-rank", 100, "--seed", 7, "-o", again)
    assert again.read_bytes() == path.read_bytes()


def test_every_flag_of_synth_reaches_the_generator(capsys, tmp_path):
    path = tmp_path / "t.npz"
    flags = {"--groups": 4, "--interval": 5, "--affinity": 0.5, "--source-affinity": 0.25, "--steps": 2, "--tokens-per-rank": 32}
    command = ["trace", "synth", "--kind", "clustered", *(x for flag in flags.items() for x in flag), "--no-coactivation", "-o", path]
    assert scalemoe(capsys, *command, "--quiet")[2] == ""
    trace = load_trace(path)
    assert trace.coactivation is None
    assert trace.iterations == [0, 5]
    wanted = {"groups": 4, "affinity": 0.5, "source_affinity": 0.25, "tokens_per_rank": 32, "source": "synthetic clustered"}
    assert {key: trace.meta[key] for key in wanted} == wanted


def test_the_kinds_on_the_command_line_are_those_of_the_generator():
    assert set(KINDS) == set(DEFAULTS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source-affinity", 2], "--source-affinity: must be from 0 to 1\n  found: 2.0\n"),
        (["--topk", 99], "--topk: must be at most the number of experts\n"),
        (["--drift", 0.99], "--drift: this popularity cannot change by"),
        (["--kind", "recorded", "--skew", 1], "--skew: does not apply to the kind recorded"),
        (["--ranks", 0], "--ranks: must be 1 or more\n  found: 0\n"),
        (["--tokens-per-rank", 0], "--tokens-per-rank: must be 1 or more"),
    ],
)
def test_a_wrong_value_is_a_user_error_that_names_the_flag(capsys, tmp_path, flags, message):
    code, out, err = scalemoe(capsys, "trace", "synth", *flags, "-o", tmp_path / "t.npz")
    assert (code, out) == (1, "")
    assert err.startswith(f"scalemoe: error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_trace_is_kept_without_force(capsys, tmp_path):
    path = tmp_path / "t.npz"
    path.write_bytes(b"mine")
    assert scalemoe(capsys, "trace", "synth", "-o", path)[0] == 1
    assert path.read_bytes() == b"mine"
    assert scalemoe(capsys, "trace", "synth", "-o", path, "--force")[0] == 0
    assert load_trace(path).num_experts == 64


def test_the_trace_must_be_an_npz_file(capsys, tmp_path):
    code, _, err = scalemoe(capsys, "trace", "synth", "-o", tmp_path / "t.json")
    assert code == 1
    assert f"try:   -o {tmp_path / 't.npz'}" in err
    assert scalemoe(capsys, "trace", "synth")[0] == 2


def write_job(folder: Path) -> None:
    for rank in range(2):
        record = {
            "step": 3,
            "block": "decoder",
            "layer": 1,
            "rank": rank,
            "num_tokens": 2,
            "topk": 2,
            "top_indices": [[0, 1], [1, rank + 2]],
        }
        late = {**record, "step": 4}
        lines = [record] if rank else [record, late]
        (folder / f"router_trace_rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_convert_reads_a_job_of_megatron(capsys, tmp_path):
    write_job(tmp_path)
    path = tmp_path / "t.npz"
    code, out, err = scalemoe(capsys, "trace", "convert", tmp_path, "--experts", 4, "-o", path)
    assert code == 0
    assert out.startswith(f"{path}: 1 steps, 1 layers, 2 ranks, 4 experts, top-2, 4 tokens per step, with co-activation\n")
    expected_err = [
        "reading router_trace_rank0.jsonl",
        "reading router_trace_rank1.jsonl",
        "left out 1 iterations that some rank or layer lacks",
    ]
    assert err.splitlines()[:3] == expected_err
    assert load_trace(path).counts[0, 0].tolist() == [[1, 2, 1, 0], [1, 2, 0, 1]]
    code, out, err = scalemoe(capsys, "trace", "convert", tmp_path, "--experts", 3, "-o", tmp_path / "u.npz", "--quiet")
    assert code == 1
    assert "router_trace_rank1.jsonl:1: top_indices: must be experts 0..2" in err


def test_summary_prints_each_layer_and_the_mean(capsys, tmp_path):
    path = tmp_path / "t.npz"
    scalemoe(capsys, "trace", "synth", "--layers", 3, "-o", path)
    code, out, err = scalemoe(capsys, "trace", "summary", path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[4:8]] == ["0", "1", "2", "mean"]
    assert "drift 50" not in out
    code, out, _ = scalemoe(capsys, "trace", "summary", path, "--json", "-o", tmp_path / "s.json")
    summary = json.loads(out)
    assert summary == json.loads((tmp_path / "s.json").read_text())
    assert summary["total"]["drift_1"] == pytest.approx(0.02, abs=0.015)
    assert len(summary["per_layer"]) == 3


def test_summary_draws_a_picture(capsys, tmp_path):
    path = tmp_path / "t.npz"
    scalemoe(capsys, "trace", "synth", "-o", path)
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        picture = tmp_path / f"p{suffix}"
        code, _, err = scalemoe(capsys, "trace", "summary", path, "--plot", picture)
        assert (code, err) == (0, f"{picture}: written\n")
        assert picture.read_bytes().startswith(start)
    code, _, err = scalemoe(capsys, "trace", "summary", path, "--plot", picture)
    assert code == 1
    assert err.startswith(f"scalemoe: error: --plot: {picture} exists")
    code, _, err = scalemoe(capsys, "trace", "summary", path, "--plot", tmp_path / "p.gif")
    assert code == 1
    assert "--plot: must end in .svg, .png, .pdf" in err
