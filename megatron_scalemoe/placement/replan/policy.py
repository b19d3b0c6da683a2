"""When to replan: only when a new plan saves enough, surely enough, and soon pays back what it costs to move the experts."""

from __future__ import annotations

import dataclasses
import math

from megatron_scalemoe.errors import ScaleMoEError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReplanPolicy:
    """What makes a new plan worth its migration. Raises `ScaleMoEError` on a value out of range."""

    min_saving: float = 0.02
    """Least part of the step's cost that the new plan must save (threshold). The way back would need as much again (hysteresis)."""

    horizon_steps: int = 500
    """Steps within which the saving must pay back the migration: about how long a plan stays good."""

    noise_factor: float = 2.0
    """The saving counts less this many times its noise."""

    def __post_init__(self) -> None:
        for name, least in (("min_saving", 0.0), ("horizon_steps", 1), ("noise_factor", 0.0)):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= least):
                raise ScaleMoEError(f"{name} must be {least:g} or more", found=getattr(self, name))


@dataclasses.dataclass(frozen=True, slots=True)
class ReplanDecision:
    """replan: whether to move. saving_us: per step, less noise. payback_steps: inf if never. reason: in words."""

    replan: bool
    saving_us: float
    payback_steps: float
    reason: str


def should_replan(
    current_us: float,
    proposed_us: float,
    migration_us: float,
    policy: ReplanPolicy | None = None,
    *,
    noise_us: float = 0.0,
    unpaid_us: float = 0.0,
) -> ReplanDecision:
    """Whether to replace the current plan by the proposed one.

    current_us, proposed_us: cost of a step under each, for the same recent traffic. migration_us: 0 if only replicas change.
    noise_us: how uncertain the difference of the two is (its standard error over the recorded steps, say).
    unpaid_us: what the last migration cost less what it has saved since; above 0 the new plan must earn that as well.

    A plan that replaced another saved `min_saving` of a step; going back must save that much, too. So between two plans whose costs differ
    by less, whatever the noise, nothing moves.
    """
    policy = policy or ReplanPolicy()
    for name, value in (("current_us", current_us), ("proposed_us", proposed_us), ("migration_us", migration_us), ("noise_us", noise_us)):
        if not (math.isfinite(value) and value >= 0):
            raise ScaleMoEError(f"{name} must be a number from 0", found=value)
    saving_us = current_us - proposed_us - policy.noise_factor * noise_us
    if saving_us <= 0:
        why = "the proposed plan saves nothing" if proposed_us >= current_us else "what the proposed plan saves is within the noise"
        return ReplanDecision(False, saving_us, math.inf, why)
    share, to_earn_us = saving_us / current_us, migration_us + max(0.0, unpaid_us)
    payback_steps = to_earn_us / saving_us
    saves = f"saves {saving_us / 1e3:.3g} ms a step ({share:.1%})"
    if share < policy.min_saving:
        return ReplanDecision(False, saving_us, payback_steps, f"{saves}, less than {policy.min_saving:.1%}")
    pays = f"pays back {to_earn_us / 1e3:.3g} ms in {math.ceil(min(payback_steps, 1e15))} steps"
    if payback_steps > policy.horizon_steps:
        return ReplanDecision(False, saving_us, payback_steps, f"{saves}, but {pays}: more than {policy.horizon_steps}")
    return ReplanDecision(True, saving_us, payback_steps, f"{saves}, {pays}")
