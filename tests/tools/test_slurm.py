"""A job on a real SLURM on this machine: submitted, preempted in the middle, put back into the queue, and trained on with the same loss.

SCALEMOE_TEST_SLURM=1 pytest tests/tools/test_slurm.py      needs slurm-wlm and munge (tools/local_slurm.sh); takes about two minutes
With MEGATRON_LM_PATH, the same with Megatron-LM's pretrain_gpt.py.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCAL_SLURM = ROOT / "tools" / "local_slurm.sh"
ITERATIONS = 60
LOSS = re.compile(r"iteration +(\d+)/ .*lm loss: ([\d.E+-]+)")
CHECKPOINT = "checkpoints/latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def slurm():
    """The environment in which sbatch and the others talk to a SLURM of our own."""
    if os.environ.get("SCALEMOE_TEST_SLURM") != "1":
        pytest.skip("SCALEMOE_TEST_SLURM=1 is not set: two minutes on a SLURM that the test starts")
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:  # a socket's path must be short
        try:
            started = subprocess.run(["bash", LOCAL_SLURM, "start", folder], capture_output=True, text=True, timeout=90)
            assert started.returncode == 0, started.stderr
            assert started.stdout == f"export SLURM_CONF={folder}/slurm.conf\n"
            yield {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PYTHONPATH": str(ROOT)}
        finally:
            stopped = subprocess.run(["bash", LOCAL_SLURM, "stop", folder], capture_output=True, text=True, timeout=120)
            assert stopped.returncode == 0, stopped.stderr
        status = subprocess.run(["bash", LOCAL_SLURM, "status", folder], capture_output=True, text=True, timeout=30)
        assert status.stdout == "not running\n"


def wait_until(condition: Callable[[], bool], what: str, log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        said = log.read_text()[-3000:] if log.exists() else "no log"
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s\n{said}"
        time.sleep(0.2)


def submit(slurm: dict, folder: Path, base: str, **cluster: str) -> Path:
    """Submits the job from the repository's root, where the examples are; returns its log."""
    lines = [f"  {name}: {value}" for name, value in {"venv": sys.prefix, "run_dir": folder / "run", "job_name": "test", **cluster}.items()]
    training = f"{{train_iters: {ITERATIONS}, lr_decay_iters: {ITERATIONS}, log_interval: 1, save_interval: 10, eval_interval: 1000}}"
    (folder / "job.yaml").write_text("\n".join(["schema_version: 1", f"base: {base}", f"training: {training}", "cluster:", *lines]) + "\n")
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", "launch", "--config", str(folder / "job.yaml")]
    script = subprocess.run([*command, "--dry-run"], env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert script.returncode == 0, script.stderr
    options = ["--parsable", f"--output={folder}/job.log"]
    result = subprocess.run(["sbatch", *options], input=script.stdout, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return folder / "job.log"


def queue(slurm: dict) -> str:
    return subprocess.run(["squeue", "--noheader"], env=slurm, capture_output=True, text=True, timeout=60).stdout


def losses(text: str) -> dict[int, float]:
    return {int(iteration): float(loss) for iteration, loss in LOSS.findall(text)}


@pytest.mark.parametrize("program", ["tiny_cpu", "tiny_cpu_megatron_lm"])
def test_a_preempted_job_trains_on_with_the_same_loss(slurm, tmp_path, program):
    cluster = {}
    if program == "tiny_cpu_megatron_lm":
        if not os.environ.get("MEGATRON_LM_PATH"):
            pytest.skip("MEGATRON_LM_PATH is not set: it names a checkout of Megatron-LM, tag core_v0.16.1")
        cluster["megatron_lm_path"] = os.environ["MEGATRON_LM_PATH"]
    log = submit(slurm, tmp_path, ROOT / "examples" / "configs" / f"{program}.yaml", **cluster)
    checkpoint = tmp_path / "run" / CHECKPOINT
    wait_until(lambda: len(losses(log.read_text() if log.exists() else "")) >= 23, "23 iterations", log, 180)
    urgent = ["sbatch", "--partition=urgent", "--ntasks=4", "--output=/dev/null", "--wrap=sleep 1"]
    subprocess.run(urgent, env=slurm, check=True, capture_output=True, timeout=60)
    wait_until(lambda: not queue(slurm), "the end of both jobs", log, 240)

    first, restarted, second = log.read_text().partition("restart 1: 2 ranks on")
    assert restarted, first
    assert "USR1: the ranks are to save a checkpoint and end" in first
    assert "back into the queue" in first
    resumed_from = int(re.search(r"going on from iteration (\d+)", second)[1])
    before, after = losses(first), losses(second)
    assert min(after) == resumed_from + 1
    assert max(after) == int(checkpoint.read_text()) == ITERATIONS
    if program == "tiny_cpu":  # the example saves at its intervals only: what came after the last one is trained again
        assert resumed_from % 10 == 0
        again = sorted(set(before) & set(after))
        assert again
        assert [after[i] for i in again] == pytest.approx([before[i] for i in again], abs=1e-4)
    else:  # Megatron saves when it is told to end
        assert resumed_from == max(before)
    assert after[ITERATIONS] < before[1] - 1
    assert (tmp_path / "run" / "rank_to_host.0.txt").read_text().split()[::3] == ["0", "1"]
    assert (tmp_path / "run" / "rank_to_host.1.txt").is_file()


@pytest.mark.parametrize(("script", "result"), [("bench", "bench.json"), ("topology", "topology.yaml")])
def test_measurements_run_on_the_jobs_ranks(slurm, tmp_path, script, result):
    job = f"schema_version: 1\nbase: {ROOT}/examples/configs/tiny_cpu.yaml\ncluster: {{venv: {sys.prefix}, run_dir: {tmp_path}/run}}\n"
    (tmp_path / "job.yaml").write_text(job)
    command = [sys.executable, "-m", "megatron_scalemoe.cli.main", "launch", "--config", "job.yaml", "--script", script]
    submitted = subprocess.run(command, env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert submitted.stdout.startswith("submitted job "), submitted.stderr
    wait_until(lambda: not queue(slurm), "the end of the job", tmp_path / "no.log", 120)
    (log,) = tmp_path.glob("scalemoe-job-*.log")
    assert (tmp_path / "run" / result).is_file(), log.read_text()


def test_without_the_packages_it_says_what_to_install(tmp_path):
    for name in ("bash", "id", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    program = LOCAL_SLURM.read_text().replace('PATH="$PATH:/usr/sbin:/sbin"\n', "")
    result = subprocess.run(
        ["bash", "-c", program, "local_slurm.sh", "start"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 1
    assert "not installed: munged slurmctld slurmd sbatch scontrol" in result.stderr
    assert "sudo apt-get install slurm-wlm munge" in result.stderr


def test_a_folder_that_slurm_could_not_use_is_refused():
    result = subprocess.run(["bash", LOCAL_SLURM, "start", "/tmp/with blank"], capture_output=True, text=True, timeout=30)
    assert result.returncode == 1
    assert "FOLDER must be an absolute path" in result.stderr
