"""Commands of the documentation, executed as they are written there; what they print is what the page says.

Only what a time budget or a clock decides may differ: of such commands the labels are compared, and the contiguous placement's figures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.cli.test_flags import JOB
from tests.docs.docs_pages import FENCE, ROOT, fenced_commands, is_output, shown_runs, without_measured
from tests.docs.test_formats_page import blocks

SAMPLES = ROOT / "tests" / "topology" / "discover" / "samples"
MEASURED = re.compile(r"scalemoe (plan|simulate|compare|diff|report|topology measure) ")
# In formats.md: what does not depend on the plan that was found, nor on the machine.
FIXED = re.compile(r"\.(baseline|cost|provenance)\.|^\.rows\.0\.(?!seconds)")


@pytest.fixture
def shell(tmp_path):
    """Runs a command line in an empty folder that has the repository's `examples`; `scalemoe` and `python` are those of the tests."""
    (tmp_path / "programs").mkdir()
    programs = {"scalemoe": f'exec "{sys.executable}" -m megatron_scalemoe.cli.main "$@"', "python": f'exec "{sys.executable}" "$@"'}
    programs["sbatch"] = "cat >submitted.sbatch\necho 4711"
    for name, body in programs.items():
        (tmp_path / "programs" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "programs" / name).chmod(0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    environment = {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

    def run(command: str) -> subprocess.CompletedProcess:
        env = os.environ | environment
        return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=300)

    run.folder = folder
    return run


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def problems(shell, name: str) -> list[str]:
    """Of the `$ ` commands of a page, in their order."""
    found = []
    assert shown_runs(page(name))
    for command, printed, code in shown_runs(page(name)):
        done = shell(command)
        real = done.stderr if code == 1 else done.stdout
        if MEASURED.match(command):
            printed, real = without_measured(printed), without_measured(real)
        if done.returncode != code or not is_output(printed, real):
            found.append(f"{name}: {command}\nexit code {done.returncode}, on the page:\n{printed}\nfrom the run:\n{real}\n{done.stderr}")
    return found


def test_the_planners_tour_and_its_other_commands(shell):
    """The pages go on with each other's files. With the default time budgets: a minute."""
    found = problems(shell, "docs/planner-tour.md")
    (shell.folder / "run").mkdir()
    for file in ("old.json", "small.yaml", "recorded.npz"):
        shutil.copy(shell.folder / file, shell.folder / "run")
    for file in (ROOT / "examples/topologies/p4d_heterogeneous.yaml", SAMPLES / "nvidia_smi_dgx_h100.txt", SAMPLES / "slurm_tree.conf"):
        shutil.copy(file, shell.folder)
    found += problems(shell, "docs/planner.md")
    assert not found, "\n".join(found)


def test_a_jobs_file(shell):
    (shell.folder / "job.yaml").write_text(JOB.replace("num_experts: 8", "num_experts: 6"))
    found = problems(shell, "docs/config.md")
    assert not found, "\n".join(found)


def unlike(printed: object, real: object, path: str = "") -> Iterator[str]:
    """Where the page's JSON has other keys, or other values than a run must have."""
    if isinstance(printed, dict) and isinstance(real, dict):
        yield from (f"{path}.{key} is in one only" for key in printed.keys() ^ real.keys())
        for key in printed.keys() & real.keys():
            yield from unlike(printed[key], real[key], f"{path}.{key}")
    elif isinstance(printed, list) and isinstance(real, list):
        for index, pair in enumerate(zip(printed, real, strict=False)):
            yield from unlike(*pair, f"{path}.{index}")
    elif FIXED.search(path) and printed != (pytest.approx(real, rel=1e-5) if isinstance(real, float) else real):
        yield f"{path} is {printed} on the page, {real} from the run"


def test_the_formats_examples_come_from_these_commands(shell):
    commands = fenced_commands(page("docs/formats.md"))
    runs = [shell(command) for command in commands]
    assert [run.returncode for run in runs] == [0] * 5, [run.stderr for run in runs]
    assert (shell.folder / "topology.yaml").read_text() == blocks("yaml")[0]
    printed = [json.loads(text) for text in blocks("json")]
    timeline = json.loads((shell.folder / "timeline.json").read_text())
    real = [json.loads((shell.folder / "plan.json").read_text()), *(json.loads(run.stdout) for run in runs[2:])]
    assert [list(unlike(*pair)) for pair in zip(printed, real, strict=False)] == [[]] * 4
    names = [{(event["name"].split()[0], *sorted(event)) for event in example["traceEvents"]} for example in (printed[-1], timeline)]
    assert names[0] <= names[1]


def test_the_formats_example_of_bench_dispatch(shell):
    pytest.importorskip("megatron.core")
    [command] = re.findall(r"rows of `(scalemoe bench dispatch [^`]+)`", page("docs/formats.md"))
    done = shell(command)
    assert done.returncode == 0, done.stderr
    real, printed = json.loads(done.stdout), json.loads(blocks("json")[4])
    assert real.keys() - printed.keys() == {"env"}
    rows = {(row["dispatcher"], row["transport"]): row for row in real["rows"]}
    for row in printed["rows"]:
        measured = rows[row["dispatcher"], row["transport"]]
        assert measured.keys() == row.keys()
        assert {key: measured[key] for key in row if key.startswith("bytes")} == {key: row[key] for key in row if key.startswith("bytes")}


def test_launch(shell):
    commands = [
        command for command in fenced_commands(page("docs/slurm.md")) if command.startswith("scalemoe launch") and "paper" in command
    ]
    script, submitted = shell(commands[0]).stdout, shell.folder / "submitted.sbatch"
    assert script.startswith("#!/usr/bin/env bash\n")
    assert not submitted.exists()
    assert shell(commands[1]).stdout.startswith("submitted job 4711")
    assert submitted.read_text() == script
    assert shell(commands[2]).stdout.startswith("submitted job 4711")
    assert "topology.yaml" in submitted.read_text()
    assert "topology.yaml" not in script


def test_the_lines_of_python_that_time_routes(capsys):
    [code] = [block for _, block in FENCE.findall(page("docs/benchmarks.md")) if block.startswith("import ")]
    exec(compile(code, "docs/benchmarks.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["rail_optimized", "fat_tree"]
