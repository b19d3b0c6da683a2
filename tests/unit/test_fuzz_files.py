"""10,000 damaged files: whatever is wrong with one, the reader answers with a ScaleMoEError or with valid content, never another exception."""

import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan import PlacementPlan, load_plan, save_plan
from megatron_scalemoe.topology.files import load_topology
from megatron_scalemoe.traffic.megatron_jsonl import load_megatron_jsonl
from megatron_scalemoe.traffic.trace import RoutingTrace, load_trace, save_trace

SAMPLES = Path(__file__).resolve().parent.parent / "topology" / "discover" / "samples"
TOKENS = [b"-1", b"0", b"1e999", b".nan", b"null", b"true", b"{}", b"[]", b'"', b"\n", b"\t", b"99999999999999999999", b"&a", b"*a", b"!!", b"<", b"\xff", b": "]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four edits: a byte changed, a stretch cut, doubled or replaced by something awkward, or the end missing."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 64)))
        kind = rng.randrange(5)
        if kind == 0 and at < len(content):
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:end] + content[at:end] + content[end:]
        elif kind == 3:
            content = content[:at] + rng.choice(TOKENS) + content[end:]
        elif rng.random() < 0.2:
            content = content[:at]
    return content


def plan_file(path: Path) -> None:
    save_plan(PlacementPlan.contiguous(2, 2, 4, replica_slots_per_rank=1), path)


def trace_file(path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, (2, 1, 2, 4))
    save_trace(RoutingTrace(counts, np.ones((1, 4, 4)), {"topk": 2, "iterations": [0, 10]}), path)
