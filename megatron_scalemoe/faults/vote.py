"""All ranks or none: how ranks find out, before they change anything, that every one of them can."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.ops.ragged import naming_failure


class Echo(ScaleMoEError):
    """A consequence of what another rank objects to, raised in `Vote.attempt`; only the cause is reported."""


class Vote:
    """One rank's readiness, and how the ranks of a group find out whether all are ready.

    A rank that fails by itself must go on with the collectives of the others, or they wait for ever. So its own work goes through
    `attempt`, which keeps the first failure for the next count and skips the rest. Never put a collective into it.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
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
        said: list = [None] * self.group.size()
        with naming_failure("migration: gathering objections", self.group):
            dist.all_gather_object(said, (self._is_echo, self.objection, subject), group=self.group)
        objections = sorted((said_by for said_by in said if said_by[1]), key=lambda said_by: said_by[0])
        if objections:
            return objections[0][1]
        ranks = dist.get_process_group_ranks(self.group)
        subjects = [their_subject for *_, their_subject in said]
        other = next(i for i, their_subject in enumerate(subjects) if their_subject != subjects[0])
        return f"rank {ranks[other]} disagrees with rank {ranks[0]}: it has {subjects[other]}, not {subjects[0]}"

    def _smallest(self, values: list[int]) -> list[int]:
        votes = torch.tensor(values, dtype=torch.int64, device=self.device)
        with naming_failure("migration: agreement", self.group):
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self.group)
        return votes.tolist()
