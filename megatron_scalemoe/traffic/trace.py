"""`RoutingTrace`: how many tokens of each rank chose each expert, per recorded step and layer; and its npz file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import open_regular, write_atomically
from megatron_scalemoe.typed import Facts, SchemaVersion, check
from megatron_scalemoe.version import SCHEMA_VERSION

# More is a typing error, and arrays of experts^2 would not fit.
MAX_EXPERTS = 65_536
_ZIP = b"PK\x03\x04"
# Of a file, and of an array in it when unpacked.
MOST_BYTES = 8 << 30
# Nobody records more tokens; beyond, sums and ratios would overflow.
_MOST_TOKENS = 1e15


@dataclasses.dataclass(frozen=True, eq=False)
class LayerTraffic:
    """The mean traffic of one layer in one step. G source ranks, E experts, S steps.

    counts: float64 [G, E], tokens of rank g that choose expert e.
    coactivation: float64 [E, E] or None, tokens (of all ranks) that choose both e and f; symmetric, zero diagonal.
    loads: float64 [S, E], tokens for each expert in each single step, oldest first.
    topk: experts per token.
    """

    counts: np.ndarray
    coactivation: np.ndarray | None
    loads: np.ndarray
    topk: int


class _Meta(Facts):
    schema_version: SchemaVersion = SCHEMA_VERSION
    topk: Annotated[int, Field(ge=1)] = 1
    iterations: list[int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RoutingTrace:
    """A recorded (or synthetic) routing. S steps, L layers, G source ranks, E experts.

    counts: int32 [S, L, G, E], tokens of rank g that chose expert e.
    coactivation: float64 [L, E, E] or None, tokens that chose both e and f; the diagonal holds those that chose e. It may come from a
        sample of the tokens: only its size relative to its diagonal matters.
    meta: `topk` (default 1), `iterations` (the iteration of each step; default 0, 1, 2...), and whatever made the trace.

    Raises `ScaleMoEError` when shapes, types or values do not fit.
    """

    counts: np.ndarray
    coactivation: np.ndarray | None = None
    meta: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = self.counts
        if counts.ndim != 4 or not counts.size or counts.dtype.kind not in "iu":
            raise ScaleMoEError("counts must be integers [steps, layers, ranks, experts]", found=f"{counts.dtype} {counts.shape}")
        if counts.min() < 0 or counts.max() > np.iinfo(np.int32).max:
            raise ScaleMoEError("counts must be 0 or more, and fit int32", found=f"{counts.min()}..{counts.max()}")
        object.__setattr__(self, "counts", counts.astype(np.int32, copy=False))
        self._check_coactivation()
        self._check_meta()

    def _check_coactivation(self) -> None:
        if self.coactivation is None:
            return
        together = self.coactivation
        layers, experts = self.counts.shape[1], self.counts.shape[3]
        if together.shape != (layers, experts, experts) or together.dtype.kind not in "iuf":
            problem = f"coactivation must be numbers [layers, experts, experts] = {(layers, experts, experts)}"
            raise ScaleMoEError(problem, found=f"{together.dtype} {together.shape}")
        together = together.astype(np.float64)
        if not np.isfinite(together).all() or together.min() < 0 or not np.array_equal(together, together.transpose(0, 2, 1)):
            raise ScaleMoEError("coactivation must be symmetric, finite and 0 or more")
        if together.max() > _MOST_TOKENS or together[together > 0].min(initial=1.0) < 1 / _MOST_TOKENS:
            raise ScaleMoEError(f"coactivation must be 0, or from {1 / _MOST_TOKENS:g} to {_MOST_TOKENS:g} tokens")
        object.__setattr__(self, "coactivation", together)

    def _check_meta(self) -> None:
        try:
            meta = check(_Meta, dict(self.meta))
        except ScaleMoEError as error:
            raise error.at("meta") from error
        if meta.topk > self.num_experts:
            raise ScaleMoEError(f"must be 1 to the {self.num_experts} experts", found=meta.topk, field=("topk",), place="meta")
        if meta.iterations is not None and len(meta.iterations) != self.num_steps:
            problem = f"must name one iteration for each of the {self.num_steps} steps"
            raise ScaleMoEError(problem, found=len(meta.iterations), field=("iterations",), place="meta")

    @property
    def topk(self) -> int:
        return self.meta.get("topk", 1)

    @property
    def iterations(self) -> list[int]:
        """The training iteration of each step."""
        return self.meta.get("iterations") or list(range(self.num_steps))

    @property
    def num_steps(self) -> int:
        return self.counts.shape[0]

    @property
    def num_layers(self) -> int:
        return self.counts.shape[1]

    @property
    def num_ranks(self) -> int:
        return self.counts.shape[2]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[3]

    @property
    def content_hash(self) -> str:
        """Equal for equal counts and co-activation."""
        digest = hashlib.sha256(str(self.counts.shape).encode() + self.counts.astype("<i4").tobytes())
        if self.coactivation is not None:
            digest.update(self.coactivation.astype("<f8").tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def busy_SL(self) -> np.ndarray:
        """bool [S, L]: where any token chose an expert. A step or layer without tokens says nothing of the routing: means leave it out."""
        return self.counts.any(axis=(2, 3))

    @property
    def num_idle_steps(self) -> int:
        """Steps in which a layer has no tokens that has some in others."""
        return int((~self.busy_SL[:, self.busy_SL.any(axis=0)]).any(axis=1).sum())

    def layer(self, layer: int, steps: slice = slice(None)) -> LayerTraffic:
        """The mean traffic of one layer over those of `steps` in which it has any. `layer` -1 is not special: it is the last one."""
        window = self.counts[steps, layer].astype(np.float64)
        counts = window.sum(axis=0) / max(self.busy_SL[steps, layer].sum(), 1)
        return LayerTraffic(counts, self._pairs_per_step(layer, counts.sum()), window.sum(axis=1), self.topk)

    def _pairs_per_step(self, layer: int, selections: float) -> np.ndarray | None:
        if self.coactivation is None:
            return None
        pairs = self.coactivation[layer].copy()
        sampled = np.trace(pairs)
        np.fill_diagonal(pairs, 0.0)
        # Without a diagonal the pairs were counted over the whole trace.
        return pairs * (selections / sampled if sampled > 0 else 1.0 / max(self.busy_SL[:, layer].sum(), 1))


def save_trace(trace: RoutingTrace, path: Path, *, force: bool = False, compress: bool = True) -> None:
    """Writes `counts`, `coactivation` (if any) and `meta` (JSON text) as npz, atomically. Compressing takes much longer than writing."""
    arrays = {"counts": trace.counts, "meta": np.array(json.dumps({**trace.meta, "schema_version": SCHEMA_VERSION}))}
    if trace.coactivation is not None:
        arrays["coactivation"] = trace.coactivation
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **arrays)
    write_atomically(path, buffer.getvalue(), force=force)


def load_trace(path: Path) -> RoutingTrace:
    """Reads and checks a trace file. Raises `ScaleMoEError` naming file and array."""
    with open_regular(path, most=MOST_BYTES) as file:
        begin = file.read(16)
        if not begin.startswith(_ZIP):
            found = f"a file that begins with {begin!r}"
            raise ScaleMoEError(f"{path}: not a readable npz file", found=found, try_="scalemoe trace synth, or trace convert")
        try:
            with zipfile.ZipFile(file) as archive:
                members = [member.removesuffix(".npy") for member in archive.namelist()]
                arrays = {name: _array(archive, f"{name}.npy") for name in ("counts", "coactivation", "meta") if name in members}
        except ScaleMoEError as error:
            raise error.at(f"{path}: {error.place}") from error
        except Exception as error:  # BadZipFile, zlib.error, ValueError of a corrupt header...: npz has no one error of its own
            raise ScaleMoEError(f"{path}: not a readable npz file", found=error) from error
    if "counts" not in arrays:
        raise ScaleMoEError(f"{path}: counts: the array is missing", found=f"arrays {sorted(members)}")
    try:
        return RoutingTrace(arrays["counts"], arrays.get("coactivation"), _parse_meta(arrays.get("meta")))
    except ScaleMoEError as error:
        raise error.at(": ".join(filter(None, (str(path), error.place)))) from error


def _array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """An array of an npz file, unpacked only if it has the size that it declares."""
    size = archive.getinfo(member).file_size
    if size > MOST_BYTES:
        raise ScaleMoEError(f"must be {MOST_BYTES >> 30} GiB or less", found=f"{size >> 30} GiB", place=member.removesuffix(".npy"))
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ScaleMoEError("must be numbers", found="Python objects", place=member.removesuffix(".npy"))
        if file.tell() + math.prod(shape) * dtype.itemsize != size:
            raise ScaleMoEError(
                "must have the size that it declares", found=f"{shape} of {dtype}, {size} bytes", place=member.removesuffix(".npy")
            )
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _parse_meta(array: np.ndarray | None) -> dict:
    if array is None:
        return {}
    try:
        meta = json.loads(str(array[()]))
    except (ValueError, RecursionError) as error:
        raise ScaleMoEError("must be JSON text", found=error, place="meta") from error
    if not isinstance(meta, dict):
        raise ScaleMoEError("must be a JSON mapping", found=str(meta)[:80], place="meta")
    return meta
