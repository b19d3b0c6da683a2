"""A user's error is found by every rank and told by one."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError

# Set by `scalemoe` for the ranks that it starts: a file for their first error, which it then tells itself.
TOLD_FILE = "SCALEMOE_TOLD_FILE"


def tell_once(error: ScaleMoEError) -> int:
    """Prints the error on stderr, unless another rank of this node has told the same. 1, the exit code for it."""
    told, elastic = os.environ.get(TOLD_FILE), os.environ.get("TORCHELASTIC_ERROR_FILE")
    if told is not None:
        path = Path(told)
    elif elastic is not None:  # torchrun's .../attempt_0/RANK/error.json: a folder for this start of this node's ranks
        path = Path(elastic).parent.parent / f"scalemoe-{hashlib.sha256(str(error).encode()).hexdigest()[:16]}"
    else:
        path = None
    try:
        if path is not None:
            with open(path, "x", encoding="utf-8") as file:
                file.write(str(error))
        told_there = told is not None
    except FileExistsError:
        return 1
    except OSError:  # better told twice than never
        told_there = False
    if not told_there:
        print(f"[rank {os.environ.get('RANK', 0)}] error: {error}", file=sys.stderr, flush=True)
    return 1
