"""A roll call of all ranks through the job's c10d store: who has died, hangs or left?

The first rank that calls waits for the others' answers and publishes the verdict, which all other ranks read. Each rank may call once.
"""

from __future__ import annotations

import json
import os
import time

import torch.distributed as dist

POLL_S = 0.5  # between two looks whether the roll is called
_CALLS, _TIMED_OUT, _VERDICT = "calls", "timed out", "verdict"
_ANSWER, _WAITING, _LEFT = "answer/", "waiting/", "left/"  # and the rank

Lost = dict[int, str]  # global rank -> what is known about it


class RollCall:
    """One rank's place in a roll call. Owns a connection to the store; every method may raise its RuntimeError, and block if it hangs."""

    def __init__(self, answer_s: float):
        self.rank, self._ranks, self._answer_s = dist.get_rank(), range(dist.get_world_size()), answer_s
        store, self.store_host = _own_connection()
        # Each use has keys of its own, the same on all ranks.
        number = store.add(f"scalemoe/roll_calls/{self.rank}", 1)
        self._store = dist.PrefixStore(f"scalemoe/roll_call/{number}", store)

    def look(self) -> Lost:
        """Answer if the roll is called. Returns the verdict as soon as there is one."""
        if not self._store.check([_CALLS]):
            return {}
        self._store.set(f"{_ANSWER}{self.rank}", "")
        return self._verdict() or {}

    def leave(self, reason: str) -> None:
        """Tell those who call later why this rank does not answer."""
        self._store.set(f"{_LEFT}{self.rank}", reason)

    def call(self, *, failure: str = "", leaving: str = "") -> Lost:
        """The ranks that are lost, at most `answer_s` and two polls later; empty if all are there.

        `failure`: what the collective said in which this rank waited for the others. If such a wait has timed out on any rank, ranks that
        answer but were not waiting are lost. `leaving`: why this rank will be lost, if no other is.
        """
        deadline = time.monotonic() + self._answer_s
        self._store.set(f"{_ANSWER}{self.rank}", "")
        if failure:
            self._store.set(f"{_WAITING}{self.rank}", "")
        if "imed out" in failure:
            self._store.set(_TIMED_OUT, "")
        if self._store.add(_CALLS, 1) > 1:
            return self._wait_for_verdict(deadline + 2 * POLL_S)
        lost = self._silent(deadline)
        # The first to call may only have lost its connection to a rank that timed out.
        if not lost and self._store.check([_TIMED_OUT]):
            lost = self._not_waiting(deadline)
        if leaving and not lost:
            lost = {self.rank: leaving}
        self._store.set(_VERDICT, json.dumps(lost))
        return lost

    def loss_of_store(self) -> Lost:
        """What is known if the store does not respond."""
        if self.store_host in (None, self.rank):
            return {}
        return {self.store_host: "died, hangs or left: the job's store, which is in its process, does not respond"}

    def _silent(self, deadline: float) -> Lost:
        silent, lost = set(self._ranks), {}
        while True:
            for rank in sorted(silent):
                if self._store.check([f"{_LEFT}{rank}"]):
                    lost[rank] = self._store.get(f"{_LEFT}{rank}").decode()
                    silent.remove(rank)
                elif self._store.check([f"{_ANSWER}{rank}"]):
                    silent.remove(rank)
            if not silent or time.monotonic() > deadline:
                return {**lost, **dict.fromkeys(sorted(silent), f"died or hangs: no sign of life for {self._answer_s:g} s")}
            time.sleep(POLL_S / 2)

    def _not_waiting(self, deadline: float) -> Lost:
        elsewhere = set(self._ranks)
        while True:
            elsewhere -= {rank for rank in elsewhere if self._store.check([f"{_WAITING}{rank}"])}
            if not elsewhere or time.monotonic() > deadline:
                return dict.fromkeys(sorted(elsewhere), "is alive, but did not come to the collective that the others waited for")
            time.sleep(POLL_S / 2)

    def _wait_for_verdict(self, deadline: float) -> Lost:
        while (verdict := self._verdict()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S / 2)
        return verdict or {}

    def _verdict(self) -> Lost | None:
        if not self._store.check([_VERDICT]):
            return None
        return {int(rank): known for rank, known in json.loads(self._store.get(_VERDICT)).items()}


def _own_connection() -> tuple[dist.Store, int | None]:
    """The job's store, usable while the main thread waits in it, and the rank whose process it lives in, if any."""
    store = base = dist.distributed_c10d._get_default_store()
    while isinstance(base, dist.PrefixStore):
        base = base.underlying_store
    if not isinstance(base, dist.TCPStore):
        return store, None
    in_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return store.clone(), None if in_torchrun else 0
