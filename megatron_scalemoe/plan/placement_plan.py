"""`PlacementPlan`: which expert lives in which slot of which rank, in every layer. Data only; solvers make it, the runtime obeys it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document, write_atomically
from megatron_scalemoe.typed import Model, SchemaVersion, refused
from megatron_scalemoe.version import SCHEMA_VERSION

EMPTY = -1


@dataclasses.dataclass(frozen=True, eq=False)
class PlacementPlan:
    """Placement of E logical experts on the P slots of G ranks, for each of L layers.

    Rank r holds the slots r*P/G up to (r+1)*P/G. The first E/G of them are home slots: each expert has exactly one home, which owns its
    parameters. The other slots hold replicas, or are EMPTY. A rank never holds an expert twice in one layer.

    physical_to_logical: int32 [L, P], the logical expert in each slot, or EMPTY (-1). Read-only.
    provenance: what made the plan (solver, seed, topology and trace hashes...); not part of `content_hash`.

    Raises `ScaleMoEError` when the plan breaks one of these rules: it would lose or duplicate an expert.
    """

    physical_to_logical: np.ndarray
    num_ranks: int
    num_logical_experts: int
    provenance: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = np.array(self.physical_to_logical, dtype=np.int32)
        slots.setflags(write=False)
        object.__setattr__(self, "physical_to_logical", slots)
        self._check_shape()
        homes = np.sort(
            slots.reshape(self.num_layers, self.num_ranks, -1)[:, :, : self.homes_per_rank].reshape(self.num_layers, -1), axis=1
        )
        wrong = np.flatnonzero((homes != np.arange(self.num_logical_experts)).any(axis=1))
        if wrong.size:
            problem = f"layer {wrong[0]}: the home slots (the first {self.homes_per_rank} of each rank) must hold every expert exactly once"
            raise ScaleMoEError(problem, found=f"experts {homes[wrong[0]].tolist()}")
        per_rank = np.sort(slots.reshape(self.num_layers, self.num_ranks, -1), axis=2)
        twice = (per_rank[..., 1:] == per_rank[..., :-1]) & (per_rank[..., 1:] != EMPTY)
        if twice.any():
            layer, rank, index = np.argwhere(twice)[0]
            raise ScaleMoEError(f"layer {layer}: rank {rank} must not hold an expert twice", found=f"expert {per_rank[layer, rank, index]}")

    def _check_shape(self) -> None:
        slots, ranks, experts = self.physical_to_logical, self.num_ranks, self.num_logical_experts
        if slots.ndim != 2 or not slots.size or ranks < 1 or experts < 1 or experts % ranks or slots.shape[1] % ranks:
            problem = "a plan needs layers x slots, and numbers of experts and of slots that are multiples of its ranks"
            raise ScaleMoEError(problem, found=f"{slots.shape} slots, {ranks} ranks, {experts} experts")
        if slots.shape[1] < experts:
            raise ScaleMoEError("a plan needs a slot for each expert", found=f"{slots.shape[1]} slots, {experts} experts")
        if slots.min() < EMPTY or slots.max() >= experts:
            raise ScaleMoEError(f"slots must hold experts 0..{experts - 1}, or {EMPTY} for none", found=f"{slots.min()}..{slots.max()}")

    @property
    def num_layers(self) -> int:
        return self.physical_to_logical.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.physical_to_logical.shape[1] // self.num_ranks

    @property
    def homes_per_rank(self) -> int:
        return self.num_logical_experts // self.num_ranks

    @property
    def home(self) -> np.ndarray:
        """int64 [L, E]: the home slot of each expert."""
        slots = np.arange(self.physical_to_logical.shape[1]).reshape(self.num_ranks, -1)[:, : self.homes_per_rank].reshape(-1)
        order = np.argsort(self.physical_to_logical[:, slots], axis=1)
        return slots[order]

    @property
    def home_rank(self) -> np.ndarray:
        """int64 [L, E]: the rank of each expert's home."""
        return self.home // self.slots_per_rank

    @property
    def num_copies(self) -> np.ndarray:
        """int64 [L, E]: slots that hold each expert, its home among them."""
        experts = np.arange(self.num_logical_experts)
        return (self.physical_to_logical[:, :, None] == experts).sum(axis=1)

    @property
    def logical_to_physical(self) -> np.ndarray:
        """int64 [L, E, most copies of any expert]: the slots of each expert in their order, then EMPTY."""
        copies_LE = self.num_copies
        slots_LEC = np.full((*copies_LE.shape, copies_LE.max()), EMPTY)
        for layer, expert in np.ndindex(*copies_LE.shape):
            slots_LEC[layer, expert, : copies_LE[layer, expert]] = np.flatnonzero(self.physical_to_logical[layer] == expert)
        return slots_LEC

    def hosts(self, layer: int) -> np.ndarray:
        """bool [E, G]: which ranks hold a copy of each expert."""
        hosts_EG = np.zeros((self.num_logical_experts, self.num_ranks), dtype=bool)
        slots = self.physical_to_logical[layer]
        used = np.flatnonzero(slots != EMPTY)
        hosts_EG[slots[used], used // self.slots_per_rank] = True
        return hosts_EG

    @property
    def num_replicas(self) -> np.ndarray:
        """int64 [L]: copies beside the homes."""
        return (self.physical_to_logical != EMPTY).sum(axis=1) - self.num_logical_experts

    @property
    def content_hash(self) -> str:
        """Equal for equal placements, whatever made them."""
        head = f"{self.num_ranks} {self.num_logical_experts} {self.physical_to_logical.shape}".encode()
        return hashlib.sha256(head + self.physical_to_logical.astype("<i4").tobytes()).hexdigest()

    @classmethod
    def contiguous(cls, num_layers: int, num_ranks: int, num_logical_experts: int, *, replica_slots_per_rank: int = 0) -> PlacementPlan:
        """Megatron's own placement: expert e lives on rank e // (E/G); replica slots are EMPTY."""
        if num_ranks < 1 or num_logical_experts % num_ranks:
            raise ScaleMoEError(
                "the number of experts must be a multiple of the ranks", found=f"{num_logical_experts} on {num_ranks} ranks"
            )
        home_rank = np.repeat(np.arange(num_ranks), num_logical_experts // num_ranks)
        hosts = home_rank[:, None] == np.arange(num_ranks)
        layers = [hosts] * num_layers
        return cls.from_hosts(np.tile(home_rank, (num_layers, 1)), np.stack(layers), replica_slots_per_rank=replica_slots_per_rank)

    @classmethod
    def from_hosts(
        cls, home_rank: np.ndarray, hosts: np.ndarray, *, replica_slots_per_rank: int, provenance: Mapping[str, object] | None = None
    ) -> PlacementPlan:
        """From int [L, E] home ranks and bool [L, E, G] hosts (homes included); experts in ascending order within a rank's slots."""
        layers, experts, ranks = hosts.shape
        homes_per_rank = experts // ranks
        slots = np.full((layers, ranks, homes_per_rank + replica_slots_per_rank), EMPTY, dtype=np.int32)
        is_home = home_rank[:, :, None] == np.arange(ranks)
        for first, chosen in ((0, is_home), (homes_per_rank, hosts & ~is_home)):
            layer, rank, expert = np.nonzero(chosen.transpose(0, 2, 1))
            group = layer * ranks + rank
            index = np.arange(group.size) - np.searchsorted(group, group)
            limit = homes_per_rank if first == 0 else replica_slots_per_rank
            if index.size and index.max() >= limit:
                worst = index.argmax()
                problem = f"layer {layer[worst]}: rank {rank[worst]} has room for {limit} {'replicas' if first else 'homes'}"
                raise ScaleMoEError(problem, found="more than that were placed there")
            slots[layer, rank, first + index] = expert
        return cls(slots.reshape(layers, -1), ranks, experts, provenance or {})

    def to_json(self) -> dict:
        """The content of a plan file, schema version 1."""
        return {
            "schema_version": SCHEMA_VERSION,
            "num_ranks": self.num_ranks,
            "num_logical_experts": self.num_logical_experts,
            "provenance": dict(self.provenance),
            "physical_to_logical": self.physical_to_logical.tolist(),
            "home": self.home.tolist(),
        }


def save_plan(plan: PlacementPlan, path: Path, *, force: bool = False) -> None:
    """Writes `format_plan`, atomically. Raises `ScaleMoEError` if `path` exists and `force` is not set."""
    write_atomically(path, format_plan(plan), force=force)


def format_plan(plan: PlacementPlan) -> str:
    """The plan as JSON text, one layer a line."""
    content = plan.to_json()
    rows = {key: ",\n    ".join(map(json.dumps, content.pop(key))) for key in ("physical_to_logical", "home")}
    head = json.dumps(content, indent=2)[:-2]
    body = "".join(f',\n  "{key}": [\n    {text}\n  ]' for key, text in rows.items())
    return f"{head}{body}\n}}\n"


class _PlanFile(Model):
    schema_version: SchemaVersion
    num_ranks: int
    num_logical_experts: int
    physical_to_logical: list[list[Annotated[int, Field(ge=EMPTY, lt=2**31)]]]
    home: list[list[int]] | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _same_slots(self) -> _PlanFile:
        for layer, row in enumerate(self.physical_to_logical):
            if len(row) != len(self.physical_to_logical[0]):
                problem = f"must have as many slots as layer 0 ({len(self.physical_to_logical[0])})"
                raise refused(problem, field=("physical_to_logical", layer), found=len(row))
        return self


def load_plan(path: Path) -> PlacementPlan:
    """Reads and checks a plan file. Raises `ScaleMoEError` naming file, line and field."""
    document = read_document(path)
    file = document.parse(_PlanFile)
    try:
        plan = PlacementPlan(np.array(file.physical_to_logical), file.num_ranks, file.num_logical_experts, file.provenance)
    except ScaleMoEError as error:
        raise document.error(("physical_to_logical",), error.problem, found=error.found) from error
    if file.home is not None and file.home != plan.home.tolist():
        problem = "must be the first slots of each rank, as in physical_to_logical"
        raise document.error(("home",), problem, try_="leave `home` out: it follows")
    return plan
