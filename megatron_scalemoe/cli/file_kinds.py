"""Files in each other's place: what a file is, by what is in it, when it is not what a flag wants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_bytes, read_document

_NPZ = b"PK\x03\x04"
_BY_FIELD = {"builder": "topology", "vertices": "topology", "physical_to_logical": "plan", "pairs": "probe", "rows": "result"}
_BY_FIELD |= {"step_us": "result", "program": "job"}
_MADE_BY = {"topology": "scalemoe topology build -o", "trace": "scalemoe trace synth or convert", "plan": "scalemoe plan -o"}
# No document is cheap to parse: larger ones are not looked into only to word an error better.
_MOST_BYTES = 1 << 20


@contextlib.contextmanager
def wanted(kind: str, path: Path, flag: str) -> Iterator[None]:
    """Reading of `path`, which `flag` wants to be a `kind` (topology, trace, plan): its error says so when it is another kind."""
    try:
        yield
    except ScaleMoEError as error:
        found = kind_of_file(path)
        if found in (None, kind):
            raise
        raise ScaleMoEError(f"{path} is a {found}, {flag} wants a {kind}", try_=_MADE_BY[kind]) from error


def kind_of_file(path: Path) -> str | None:
    """None if it is nothing that we know, or cannot be read."""
    try:
        if path.stat().st_size <= _MOST_BYTES and read_bytes(path)[: len(_NPZ)] != _NPZ:
            return next((kind for field, kind in _BY_FIELD.items() if field in read_document(path).data), None)
        with open(path, "rb") as file:
            return "trace" if file.read(len(_NPZ)) == _NPZ else None
    except (ScaleMoEError, OSError, ValueError):
        return None
