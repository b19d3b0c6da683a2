"""A job's sbatch script: one of the scripts in examples/slurm, with its #SBATCH lines and its USER CONFIGURATION block written anew."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_scalemoe.job.flags import program_words, section_flags
from megatron_scalemoe.job.job_file import Job

SCRIPTS = ("pretrain", "bench", "topology")
TEMPLATES = Path(__file__).resolve().parent / "templates"
_BENCH_TIME = "00:30:00"


def render_sbatch(job: Job, script: str) -> str:
    """The text of `script`, one of SCRIPTS, for the job."""
    text = (TEMPLATES / f"{script}.sbatch").read_text(encoding="utf-8")
    text = _with_directives(text, _directives(job, script))
    for name, assignment in _assignments(job, script).items():
        text = _assigned(text, name, assignment)
    first, rest = text.split("\n", 1)
    return f"{first}\n# Written by `scalemoe launch --config {job.path} --script {script}`.\n{rest}"


def _directives(job: Job, script: str) -> dict[str, str | None]:
    """The values of #SBATCH options; None for one that the script must not have."""
    cluster = job.content.cluster
    name = cluster.job_name
    directives = {
        "job-name": name if script == "pretrain" else f"{name}-{script}",
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_rank,
        "mem": cluster.memory,
        "time": cluster.time if script == "pretrain" else _BENCH_TIME,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
    }
    if script == "pretrain":
        directives["signal"] = f"B:USR1@{cluster.seconds_to_save}"
    return {name: None if value is None else str(value) for name, value in directives.items()}


def _with_directives(text: str, directives: Mapping[str, str | None]) -> str:
    """`directives` in place of the script's own of these names; others stay."""
    lines = text.split("\n")
    kept = [line for line in lines if not (line.startswith("#SBATCH --") and _name_of(line) in directives)]
    at = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    new = [f"#SBATCH --{name}={value}" for name, value in directives.items() if value is not None]
    return "\n".join([*kept[:at], *new, *kept[at:]])


def _name_of(line: str) -> str:
    return line.removeprefix("#SBATCH --").split("=")[0]


def _assignments(job: Job, script: str) -> dict[str, str]:
    """The settings of the script's block that the job decides; others keep what the script says."""
    chosen = {"RUN_DIR": "run_dir", "ENVIRONMENT": "environment", "VENV": "venv", "CONTAINER": "container"}
    cluster = job.content.cluster
    assignments = {
        name: f"{name}={shlex.quote(value)}" for name, option in chosen.items() if (value := getattr(cluster, option)) is not None
    }
    if cluster.mounts:
        assignments["MOUNTS"] = f"MOUNTS=({shlex.join(cluster.mounts)})"
    if script == "pretrain":
        assignments["PROGRAM"] = f"PROGRAM=({shlex.join(program_words(job))})"
        for section in ("model", "parallel", "moe", "training", "scalemoe"):
            rows = [(shlex.join(words), value.source) for words, value in section_flags(job, section)]
            assignments[section.upper()] = _array(section.upper(), rows)
        assignments["EXTRA"] = _array("EXTRA", [(shlex.quote(word), job.places["extra_flags",]) for word in job.content.extra_flags])
    elif script == "bench":
        assignments["BENCH"] = _array("BENCH", _bench_rows(job))
    elif topology := job.content.scalemoe.get("topology"):
        assignments["TOPOLOGY"] = f"TOPOLOGY={shlex.quote(topology)}"
    return assignments


def _bench_rows(job: Job) -> list[tuple[str, str]]:
    """The MoE layer of the job; its tokens are those of one micro-batch."""
    model, moe = job.content.model, job.content.moe
    tokens = job.content.training.micro_batch_size * model.seq_length
    rows = [
        (f"--tokens {tokens}", "micro_batch_size x seq_length"),
        (f"--hidden {model.hidden_size}", "hidden_size"),
        (f"--experts {moe.num_experts or 8}", "num_experts"),
        (f"--topk {moe.moe_router_topk}", "moe_router_topk"),
        (f"--dtype {'bf16' if model.bf16 else 'fp32'}", "bf16"),
    ]
    return [*rows, ("--skew 1.0", "Zipf exponent of the experts' load")]


def _array(name: str, rows: Sequence[tuple[str, str]]) -> str:
    """A bash array with one row a line, and where each comes from."""
    if not rows:
        return f"{name}=()"
    width = max(len(words) for words, _ in rows)
    return "\n".join([f"{name}=(", *(f"    {words.ljust(width)}  # {source}" for words, source in rows), ")"])


def _assigned(text: str, name: str, assignment: str) -> str:
    """`assignment` in place of the block's own, which is one line or an array that ends with a line of its own."""
    pattern = re.compile(rf"^{name}=(\($.*?^\)|.*?)$", re.DOTALL | re.MULTILINE)
    replaced, count = pattern.subn(lambda _: assignment, text, count=1)
    assert count == 1, name
    return replaced
