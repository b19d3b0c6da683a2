"""`Budget`: how much a search does, in iterations; and the time that may cut it short."""

from __future__ import annotations

import dataclasses
import math
import time


@dataclasses.dataclass
class Budget:
    """Given to a search, which asks it as it goes. Without a `deadline` (a `time.monotonic()` value) what it finds
    depends on the seed only.

    effort: the share of the full number of iterations. cut: whether the deadline ended the search.
    """

    effort: float = 1.0
    deadline: float = math.inf
    cut: bool = False

    def iterations(self, full: float, least: int = 1) -> int:
        """How many of `full` iterations to do."""
        return max(least, round(full * self.effort))

    def over(self) -> bool:
        """Whether the time is up."""
        self.cut = self.cut or time.monotonic() > self.deadline
        return self.cut
