"""Are all ranks started with the same settings? Asked once at start: ranks that differ would hang later, or train something else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping

import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.typed import Options

ABSENT = "not set"


def check_ranks_agree(settings: Mapping[str, object], group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank one `ScaleMoEError` that names each setting whose value differs, its values, and the ranks that have them.

    `settings` maps argparse destinations to values, e.g. `vars(args)` without what is meant to differ between ranks. The fields of
    options `scalemoe` count as settings `scalemoe_*`. Values are compared by their text; order in sets and mappings does not count.
    Collective over `group` (default: all ranks): it gathers a hash, and everything only if the hashes differ.
    """
    mine = {name: _canonical(value) for name, value in _flat(settings).items()}
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    # If any two ranks differ, every rank sees a hash other than its own, so that all of them go on to the second gather.
    if set(_gather(digest, group)) == {digest}:
        return
    differing = _differing_settings(_gather(mine, group), dist.get_process_group_ranks(group or dist.group.WORLD))
    raise ScaleMoEError(
        "all ranks must be started with the same settings",
        found="".join(f"\n    {line}" for line in differing),
        try_="start every node with the same command line, configuration files and code",
    )


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _differing_settings(by_rank: list[dict[str, str]], ranks: list[int]) -> list[str]:
    """One line per setting that differs: `--lr: 0.1 on ranks 0-2, 7; 0.2 on rank 3`."""
    lines = []
    for name in sorted(set().union(*by_rank)):
        holders: dict[str, list[int]] = {}
        for rank, settings in zip(ranks, by_rank, strict=True):
            holders.setdefault(settings.get(name, ABSENT), []).append(rank)
        if len(holders) > 1:
            values = "; ".join(f"{value} on {rank_text(held)}" for value, held in holders.items())
            lines.append(f"--{name.replace('_', '-')}: {values}")
    return lines


def rank_text(ranks: list[int]) -> str:
    """[0, 1, 2, 7] -> "ranks 0-2, 7": a job may have thousands."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"


def _flat(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings with `Options` replaced by their fields, which take the place of a flag of the same name: it may be overridden there."""
    flat = {name: value for name, value in settings.items() if not isinstance(value, Options)}
    for name in settings.keys() - flat.keys():
        flat |= {f"{name}_{field}": value for field, value in settings[name]}
    return flat


def _canonical(value: object) -> str:
    """A value's text, the same in every process: no addresses, no order where it has no meaning."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_canonical(value[key])}" for key in sorted(value, key=repr)) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(_canonical, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_canonical, value)) + "]"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
