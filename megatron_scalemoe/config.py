"""Everything a user can choose, in one frozen model.

The string under a field is its help text: `mcore.arguments` makes one `--scalemoe-*` flag from each field, and the YAML read by
`--scalemoe-config` has the same names.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from megatron_scalemoe.typed import Options, refused

Transport = Literal["auto", "collective", "shm", "cuda"]
Experts = Literal["megatron", "grouped"]
TRANSPORTS, EXPERTS = get_args(Transport), get_args(Experts)
DEFAULT_REPLAN_INTERVAL = 50


class ScaleMoEConfig(Options):
    """Options of the ScaleMoE dispatcher, experts and router. Raises `ScaleMoEError` on a value of another type or outside its range."""

    dispatch: Literal["ragged", "padded"] = "ragged"
    """How rows travel: `ragged` is adaptive all-to-all (one row per token and destination rank); `padded` is the capacity-padded
    GShard/Tutel-style baseline, for comparison."""

    transport: Transport = "auto"
    """What ragged rows travel through: `collective` is torch.distributed; `shm` is shared memory between CPU ranks of one host; `cuda` is
    our kernels between GPUs of one host. Over several hosts, shm and cuda work inside each of them, and a row goes once to each host by a
    collective. `auto` takes shm where it can be had, else collective (cuda is not yet tried on a GPU); the first rank of each group says
    which, and why. Padded dispatch takes collectives."""

    max_rows_factor: float | None = Field(default=None, ge=1)
    """Of the cuda transport: a rank has room for so many times the rows that it would get if all ranks got equally many; more are an
    error. It saves GPU memory. Default: room for the most that there can be."""

    padded_capacity_factor: float | None = Field(default=None, gt=0)
    """With `padded`: rows per expert and source rank = factor x tokens x top-k / experts, and tokens beyond it are dropped. Without it
    nothing is dropped: every expert is padded to the largest count of the step."""

    experts: Experts | None = None
    """Which experts module computes: `megatron` keeps the one in the model's spec; `grouped` is ours, stacked weights and one grouped
    matrix multiplication per layer (no Transformer Engine needed), with the same checkpoint keys. Default: megatron, or grouped with a
    plan, replicas or migration, which need it."""

    topology: str | None = None
    """The cluster, a file from `scalemoe topology`, with a GPU for each rank of the job or of one expert-parallel group. It prices replicas
    and migration. Without it one number is measured at start, and the network taken for uniform."""

    plan: str | None = None
    """Start with the placement in this file (from `scalemoe plan`): homes of experts, and replicas."""

    replicas: int | None = Field(default=None, ge=0)
    """Extra slots per layer for copies of hot experts, over all ranks of the expert-parallel group (a multiple of its size): the memory
    that replicas may take. How many are used, and for which experts, is decided at each replan. Default: as many as the plan has."""

    replan_interval: int | None = Field(default=None, ge=0)
    """Iterations between replans from the counts recorded since the last; 0 keeps the plan. Default: 50 with --scalemoe-replicas or
    --scalemoe-migrate, else 0."""

    migrate: bool = False
    """Let replans also move homes of experts between ranks, with their optimizer state, where that pays back. Off, homes stay."""

    sequence_placement: Literal["none", "affinity", "history"] = "none"
    """Which data-parallel rank computes which sequence of a global batch: `none` leaves it to the sampler; `affinity` places sequences near
    the experts that their tokens have chosen so far, by token id; `history` near those that the same sample chose when it was last seen,
    where it was, as in epochs."""

    trace_path: str | None = None
    """Record the routing into this directory, as `routing.npz` for `scalemoe plan`, one step per --scalemoe-trace-interval."""

    trace_interval: int = Field(default=10, ge=1)
    """Iterations that one recorded step of the routing sums up, for replans as well as for --scalemoe-trace-path."""

    table_interval: int = Field(default=100, ge=0)
    """Iterations between two tables of all MoE layers (load, bytes, local share, drops, replicas) in the log; 0 for none."""

    force_skew: float | None = Field(default=None, ge=0)
    """For benchmarks only: ignore the router's choice and draw experts from a Zipf law with this exponent (0 is uniform). The loss is
    then meaningless."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> ScaleMoEConfig:
        if self.padded_capacity_factor is not None and self.dispatch != "padded":
            try_ = "Megatron's own --moe-expert-capacity-factor drops tokens in the router and works with every dispatch"
            raise refused("needs dispatch padded", field=("padded_capacity_factor",), found=f"dispatch {self.dispatch}", try_=try_)
        if self.places_experts and self.experts == "megatron":
            problem = "must be grouped for a plan, replicas or migration"
            raise refused(problem, field=("experts",), found="megatron", try_="leave experts out")
        if self.places_experts and self.dispatch == "padded":
            problem = "must be ragged for a plan, replicas or migration: padded is a baseline, and knows no plans"
            raise refused(problem, field=("dispatch",), found="padded")
        return self

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
