"""Ranks that outlive their launcher would train on, with nobody to see it or to stop it."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """In a rank that torchrun started: the kernel kills this process when torchrun's ends, however that happens. Elsewhere nothing."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended in between
        os._exit(1)
