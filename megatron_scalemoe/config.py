"""Everything a user can choose, in one frozen dataclass.

The string under a field is its help text: `integration.arguments` makes one `--scalemoe-*` flag from each field, and the YAML read by
`--scalemoe-config` has the same names.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

from megatron_scalemoe.errors import ScaleMoEError

DISPATCHES = ("ragged", "padded")
EXPERTS = ("megatron", "grouped")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScaleMoEConfig:
    """Options of the ScaleMoE dispatcher, experts and router. Raises `ScaleMoEError` on a value outside its range."""

    dispatch: str = dataclasses.field(default="ragged", metadata={"choices": DISPATCHES})
    """How rows travel: `ragged` is adaptive all-to-all (one row per token and destination rank); `padded` is the capacity-padded
    GShard/Tutel-style baseline, for comparison."""

    padded_capacity_factor: float | None = dataclasses.field(default=None, metadata={"type": float})
    """With `padded`: rows per expert and source rank = factor x tokens x top-k / experts, and tokens beyond it are dropped. Without it
    nothing is dropped: every expert is padded to the largest count of the step."""

    experts: str = dataclasses.field(default="megatron", metadata={"choices": EXPERTS})
    """Which experts module computes: `megatron` keeps the one in the model's spec; `grouped` is ours, stacked weights and one grouped
    matrix multiplication per layer (no Transformer Engine needed), with the same checkpoint keys."""

    force_skew: float | None = dataclasses.field(default=None, metadata={"type": float})
    """For benchmarks only: ignore the router's choice and draw experts from a Zipf law with this exponent (0 is uniform). The loss is
    then meaningless."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
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
        if self.force_skew is not None and not self.force_skew >= 0:
            raise ScaleMoEError("--scalemoe-force-skew must be 0 or above", found=self.force_skew)


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
