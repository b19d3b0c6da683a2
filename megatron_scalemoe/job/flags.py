"""The flags of a job's training script, and what Megatron's own parser says to them."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_scalemoe.environment import PACKAGE_PARENT, installed_version
from megatron_scalemoe.job.job_file import Job, Value, flag_of
from megatron_scalemoe.job.sections import PROGRAMS, SECTIONS

_PARSER_TIMEOUT_S = 120


def section_flags(job: Job, section: str) -> list[tuple[list[str], Value]]:
    """The section's flags, each with its words and the value it comes from. False is a flag that is not given."""
    flags = []
    for (of_section, option), value in job.values.items():
        flag = flag_of(section, option)
        if of_section != section or flag is None or value.value is False:
            continue
        items = value.value if isinstance(value.value, list) else [] if value.value is True else [value.value]
        flags.append(([flag, *map(str, items)], value))
    return flags


def flag_words(job: Job) -> list[str]:
    """All flags, as words of a command line."""
    return [word for section in SECTIONS for flag, _ in section_flags(job, section) for word in flag] + job.content.extra_flags


def format_flags(job: Job) -> str:
    """One flag a line, quoted for a shell."""
    lines = [shlex.join(flag) for section in SECTIONS for flag, _ in section_flags(job, section)]
    return "\n".join(lines + [shlex.quote(word) for word in job.content.extra_flags])


def program_words(job: Job) -> list[str]:
    """What Python runs. Megatron-LM's place is `cluster.megatron_lm_path`."""
    return [word.format(megatron_lm_path=job.content.cluster.megatron_lm_path) for word in PROGRAMS[job.content.program]]


def why_unchecked(job: Job) -> str | None:
    """Asks the parser of the Megatron-LM at `cluster.megatron_lm_path`, in a process of its own: it imports much.

    None when it takes the flags, else why it could not be asked. Raises `ScaleMoEError` naming the line of a flag that it does not take.
    """
    if job.content.program != "megatron_lm":
        return None  # the examples' scripts have a parser of their own, which they ask first
    checkout = job.content.cluster.megatron_lm_path
    if checkout is None or not (Path(checkout) / "megatron" / "training").is_dir():
        return f"no Megatron-LM here in cluster.megatron_lm_path ({checkout})"
    if installed_version("torch") is None:
        return "torch is not installed here"
    command = [sys.executable, "-m", "megatron_scalemoe.mcore.scripts.flag_check", str(Path(checkout).absolute())]
    options = {"cwd": PACKAGE_PARENT, "capture_output": True, "text": True, "timeout": _PARSER_TIMEOUT_S}
    try:
        asked = subprocess.run(command, input=json.dumps(flag_words(job)), **options)
    except subprocess.TimeoutExpired:
        return f"its parser did not answer within {_PARSER_TIMEOUT_S} s"
    if asked.returncode != 0:
        return f"its parser cannot be imported here: {(asked.stderr.strip().splitlines() or [''])[-1]}"
    answer = json.loads(asked.stdout)
    if answer["problem"] is None:
        return None
    flag = re.search(r"--[\w-]+", answer["problem"])
    fields = [field for field in job.values if flag and len(field) == 2 and flag_of(*field) == flag[0]]
    field = fields[0] if fields else ("extra_flags",)
    raise job.error(field, f"Megatron's parser: {answer['problem']}", try_=answer["nearest"] and f"{answer['nearest']}?")
