"""The flags of a job's training script."""

from __future__ import annotations

import shlex

from megatron_scalemoe.job.config import JobConfig, Value
from megatron_scalemoe.job.options import PROGRAMS, SECTIONS, flag_of

FLAG_SECTIONS = tuple(section for section in SECTIONS if section != "cluster")


def section_flags(job: JobConfig, section: str) -> list[tuple[list[str], Value]]:
    """The section's flags in a fixed order, each with its words and the value it comes from. False is a flag that is not given."""
    flags = []
    for option in SECTIONS[section]:
        found = job.values.get((section, option))
        if found is None or found.value is False:
            continue
        items = found.value if isinstance(found.value, list) else [] if found.value is True else [found.value]
        flags.append(([flag_of(section, option), *map(str, items)], found))
    return flags


def flag_words(job: JobConfig) -> list[str]:
    """All flags, as words of a command line."""
    words = [word for section in FLAG_SECTIONS for flag, _ in section_flags(job, section) for word in flag]
    return words + job.extra_flags.value


def format_flags(job: JobConfig) -> str:
    """One flag a line, quoted for a shell."""
    lines = [shlex.join(flag) for section in FLAG_SECTIONS for flag, _ in section_flags(job, section)]
    return "\n".join(lines + [shlex.quote(word) for word in job.extra_flags.value])


def program_words(job: JobConfig) -> list[str]:
    """What Python runs. Megatron-LM's place is `cluster.megatron_lm_path`."""
    return [word.format(megatron_lm_path=job.get("cluster", "megatron_lm_path")) for word in PROGRAMS[job.program]]
