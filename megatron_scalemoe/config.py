"""Everything a user can choose, in one frozen dataclass.

The string under a field is its help text: `mcore.arguments` makes one `--scalemoe-*` flag from each field, and the YAML read by
`--scalemoe-config` has the same names.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from megatron_scalemoe.errors import ScaleMoEError

DISPATCHES = ("ragged", "padded")
TRANSPORTS = ("auto", "collective", "shm", "cuda")
EXPERTS = ("megatron", "grouped")
SEQUENCE_PLACEMENTS = ("none", "affinity", "history")
DEFAULT_REPLAN_INTERVAL = 50


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScaleMoEConfig:
    """Options of the ScaleMoE dispatcher, experts and router. Raises `ScaleMoEError` on a value outside its range."""

    dispatch: str = dataclasses.field(default="ragged", metadata={"choices": DISPATCHES})
    """How rows travel: `ragged` is adaptive all-to-all (one row per token and destination rank); `padded` is the capacity-padded
    GShard/Tutel-style baseline, for comparison."""

    transport: str = dataclasses.field(default="auto", metadata={"choices": TRANSPORTS})
    """What ragged rows travel through: `collective` is torch.distributed; `shm` is shared memory between CPU ranks of one host; `cuda` is
    our kernels between GPUs of one host. Over several hosts, shm and cuda work inside each of them, and a row goes once to each host by a
    collective. `auto` takes shm where it can be had, else collective (cuda is not yet tried on a GPU); the first rank of each group says
    which, and why. Padded dispatch takes collectives."""

    max_rows_factor: float | None = dataclasses.field(default=None, metadata={"type": float})
    """Of the cuda transport: a rank has room for so many times the rows that it would get if all ranks got equally many; more are an
    error. It saves GPU memory. Default: room for the most that there can be."""

    padded_capacity_factor: float | None = dataclasses.field(default=None, metadata={"type": float})
    """With `padded`: rows per expert and source rank = factor x tokens x top-k / experts, and tokens beyond it are dropped. Without it
    nothing is dropped: every expert is padded to the largest count of the step."""

    experts: str | None = dataclasses.field(default=None, metadata={"choices": EXPERTS})
    """Which experts module computes: `megatron` keeps the one in the model's spec; `grouped` is ours, stacked weights and one grouped
    matrix multiplication per layer (no Transformer Engine needed), with the same checkpoint keys. Default: megatron, or grouped with a
    plan, replicas or migration, which need it."""

    topology: str | None = None
    """The cluster, a file from `scalemoe topology`, with a GPU for each rank of the job or of one expert-parallel group. It prices replicas
    and migration. Without it one number is measured at start, and the network taken for uniform."""

    plan: str | None = None
    """Start with the placement in this file (from `scalemoe plan`): homes of experts, and replicas."""

    replicas: int | None = dataclasses.field(default=None, metadata={"type": int})
    """Extra slots per layer for copies of hot experts, over all ranks of the expert-parallel group (a multiple of its size): the memory
    that replicas may take. How many are used, and for which experts, is decided at each replan. Default: as many as the plan has."""

    replan_interval: int | None = dataclasses.field(default=None, metadata={"type": int})
    """Iterations between replans from the counts recorded since the last; 0 keeps the plan. Default: 50 with --scalemoe-replicas or
    --scalemoe-migrate, else 0."""

    migrate: bool = dataclasses.field(default=False, metadata={"type": "flag"})
    """Let replans also move homes of experts between ranks, with their optimizer state, where that pays back. Off, homes stay."""

    sequence_placement: str = dataclasses.field(default="none", metadata={"choices": SEQUENCE_PLACEMENTS})
    """Which data-parallel rank computes which sequence of a global batch: `none` leaves it to the sampler; `affinity` places sequences near
    the experts that their tokens have chosen so far, by token id; `history` near those that the same sample chose when it was last seen,
    where it was, as in epochs."""

    trace_path: str | None = None
    """Record the routing into this directory, as `routing.npz` for `scalemoe plan`, one step per --scalemoe-trace-interval."""

    trace_interval: int = dataclasses.field(default=10, metadata={"type": int})
    """Iterations that one recorded step of the routing sums up, for replans as well as for --scalemoe-trace-path."""

    table_interval: int = dataclasses.field(default=100, metadata={"type": int})
    """Iterations between two tables of all MoE layers (load, bytes, local share, drops, replicas) in the log; 0 for none."""

    force_skew: float | None = dataclasses.field(default=None, metadata={"type": float})
    """For benchmarks only: ignore the router's choice and draw experts from a Zipf law with this exponent (0 is uniform). The loss is
    then meaningless."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ScaleMoEError(f"{flag_name(f.name)} must be one of {', '.join(choices)}", found=repr(value))
        if self.padded_capacity_factor is not None:
            if self.dispatch != "padded":
                raise ScaleMoEError(
                    "--scalemoe-padded-capacity-factor needs --scalemoe-dispatch padded",
                    found=f"--scalemoe-dispatch {self.dispatch}",
                    try_="Megatron's own --moe-expert-capacity-factor drops tokens in the router and works with every dispatch",
                )
            if not self.padded_capacity_factor > 0:
                raise ScaleMoEError("--scalemoe-padded-capacity-factor must be above 0", found=self.padded_capacity_factor)
        if self.max_rows_factor is not None and not self.max_rows_factor >= 1:
            raise ScaleMoEError("--scalemoe-max-rows-factor must be 1 or more", found=self.max_rows_factor)
        if self.force_skew is not None and not self.force_skew >= 0:
            raise ScaleMoEError("--scalemoe-force-skew must be 0 or above", found=self.force_skew)
        for name, least in (("replicas", 0), ("replan_interval", 0), ("trace_interval", 1), ("table_interval", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ScaleMoEError(f"{flag_name(name)} must be {least} or more", found=value)
        if self.places_experts:
            self._check_placing()

    def _check_placing(self) -> None:
        if self.experts == "megatron":
            raise ScaleMoEError(
                "--scalemoe-plan, --scalemoe-replicas and --scalemoe-migrate need --scalemoe-experts grouped",
                found="--scalemoe-experts megatron",
                try_="leave --scalemoe-experts out",
            )
        if self.dispatch == "padded":
            raise ScaleMoEError(
                "--scalemoe-dispatch padded is a baseline: it knows no plans",
                found="--scalemoe-plan, --scalemoe-replicas or --scalemoe-migrate",
                try_="--scalemoe-dispatch ragged",
            )

    @property
    def places_experts(self) -> bool:
        """Whether experts may be elsewhere than where Megatron puts them."""
        return self.plan is not None or bool(self.replicas) or self.migrate

    @property
    def grouped_experts(self) -> bool:
        """Whether our experts module computes."""
        return self.experts == "grouped" or self.places_experts

    @property
    def replans_every(self) -> int:
        """Iterations between replans, 0 for never."""
        if self.replan_interval is not None:
            return self.replan_interval if self.places_experts else 0
        return DEFAULT_REPLAN_INTERVAL if self.replicas or self.migrate else 0


def flag_name(field_name: str) -> str:
    """`padded_capacity_factor` -> `--scalemoe-padded-capacity-factor`."""
    return "--scalemoe-" + field_name.replace("_", "-")


def field_help(cls: type = ScaleMoEConfig) -> dict[str, str]:
    """The string literal under each field of a dataclass, on one line: `{field name: help}`."""
    body = ast.parse(inspect.getsource(cls)).body[0].body
    helps = {}
    for field, text in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            helps[field.target.id] = " ".join(text.value.value.split())
    return helps


def config_from_dict(values: dict[str, Any], *, source: str) -> ScaleMoEConfig:
    """A config from a mapping, e.g. a YAML file named by `source`. Unknown names raise `ScaleMoEError`."""
    known = [f.name for f in dataclasses.fields(ScaleMoEConfig)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ScaleMoEError(f"{source}: unknown option", found=", ".join(map(str, unknown)), try_="one of " + ", ".join(known))
    return ScaleMoEConfig(**values)
