"""How ranks find out, before they go on, that all of them have the same and all of them can: ranks that differ would hang later, or train
something else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron_scalemoe.environment import code_digest
from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.ragged import naming_failure
from megatron_scalemoe.typed import Options
from megatron_scalemoe.version import __version__

ABSENT = "not set"
_CODE = "the package megatron_scalemoe"


def check_ranks_agree(settings: Mapping[str, object], group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank one `ScaleMoEError` that names each setting whose value differs, its values, and the ranks that have them.

    `settings` maps argparse destinations to values, e.g. `vars(args)` without what is meant to differ between ranks. The fields of
    options `scalemoe` count as settings `scalemoe_*`; the package's own files must be the same, too. Values are compared by their text;
    order in sets and mappings does not count.
    Collective over `group` (default: all ranks): it gathers a hash, and everything only if the hashes differ.
    """
    mine = {name: _canonical(value) for name, value in _flat(settings).items()}
    mine[_CODE] = f"{__version__}, files {code_digest()}"
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


class Echo(ScaleMoEError):
    """A consequence of what another rank objects to, raised in `Vote.attempt`; only the cause is reported."""


class Vote:
    """One rank's readiness, and how the ranks of a group find out whether all are ready. purpose: for the messages of failures.

    A rank that fails by itself must go on with the collectives of the others, or they wait for ever. So its own work goes through
    `attempt`, which keeps the first failure for the next count and skips the rest. Never put a collective into it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device | int, purpose: str):
        self.group, self.device, self._purpose = group, device, purpose
        self.objection, self._is_echo = "", False

    def attempt(self, work: Callable, *args: Any) -> Any:
        """work(*args), or None if this rank has an objection or gets one by it."""
        if self.objection:
            return None
        try:
            return work(*args)
        except Exception as error:
            self.objection = f"rank {dist.get_rank()}: {error if isinstance(error, ScaleMoEError) else repr(error)}"
            self._is_echo = isinstance(error, Echo)
            return None

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self._smallest([not flag])[0] == 0

    def refusal(self, subject: str = "") -> str:
        """Why not to go on, the same text on every rank: the first objection, or that ranks differ in `subject`; "" if none."""
        number = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:7], "big")
        ready, low, minus_high = self._smallest([not self.objection, number, -number])
        if ready and low == -minus_high:
            return ""
        with naming_failure(f"{self._purpose}: gathering objections", self.group):
            said = _gather((self._is_echo, self.objection, subject), self.group)
        objections = sorted((said_by for said_by in said if said_by[1]), key=lambda said_by: said_by[0])
        if objections:
            return objections[0][1]
        ranks = dist.get_process_group_ranks(self.group)
        subjects = [their_subject for *_, their_subject in said]
        other = next(i for i, their_subject in enumerate(subjects) if their_subject != subjects[0])
        return f"rank {ranks[other]} disagrees with rank {ranks[0]}: it has {subjects[other]}, not {subjects[0]}"

    def settle(self, subject: str = "", try_: str | None = None) -> None:
        """Raises a `ScaleMoEError` with the refusal, if there is one, on every rank."""
        if reason := self.refusal(subject):
            raise ScaleMoEError(reason, try_=try_)

    def _smallest(self, values: list[int]) -> list[int]:
        votes = torch.tensor(values, dtype=torch.int64, device=self.device)
        with naming_failure(f"{self._purpose}: agreement", self.group):
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group)
        return votes.tolist()


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
            lines.append(f"{name if name == _CODE else '--' + name.replace('_', '-')}: {values}")
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
