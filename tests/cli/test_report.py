import json

import pytest

from megatron_scalemoe.cli.main import main
from tests.report import small_run
from tests.report.small_run import write_json, write_run


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "compare.json", small_run.compare())
    return tmp_path / "run"


def test_the_page_is_written_and_its_finding_printed(run_dir, tmp_path, capsys):
    assert main(["report", str(run_dir), "-o", str(tmp_path / "out.html")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("memetic takes 455 µs where contiguous takes 910 µs")
    assert f"{tmp_path / 'out.html'}: 1 figures from 1 files" in out
    assert "scalemoe: report: reading" in err
    assert (tmp_path / "out.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_without_an_output_the_page_lies_beside_its_files_and_is_no_input_of_the_next(run_dir, capsys):
    assert main(["report", str(run_dir), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["report", str(run_dir), "--quiet"]) == 1
    assert "--force to overwrite it" in capsys.readouterr().err
    assert main(["report", str(run_dir), "--quiet", "--force", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["unrecognised"] == []
    assert result["files"] == [{"name": "compare.json", "kind": "compare"}]
    assert result["bytes"] == (run_dir / "report.html").stat().st_size


def test_damaged_files_are_warnings_and_the_exit_code_is_zero(run_dir, capsys):
    (run_dir / "bad.json").write_text("{")
    (run_dir / "notes.md").write_text("x")
    assert main(["report", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert "warning: damaged, left out" in out
    assert "bad.json:1: not valid JSON" in out
    assert "not recognised, left out: notes.md" in out


def test_an_empty_or_missing_directory_is_a_user_error(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert "holds nothing to report" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cost_flags_reach_the_page(tmp_path, capsys):
    directory = write_run(tmp_path / "run")
    assert main(["report", str(directory), "--quiet", "--gpu-tflops", "123.5"]) == 0
    page = (directory / "report.html").read_text(encoding="utf-8")
    assert "123.5" in page
    assert '<th scope="row">hidden_size</th><td>64</td>' in page  # of the trace
    assert main(["report", str(directory), "--force", "--gpu-tflops", "-1"]) == 1
    assert "--gpu-tflops" in capsys.readouterr().err
