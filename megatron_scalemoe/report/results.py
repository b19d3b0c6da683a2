"""What `scalemoe compare`, `simulate`, `plan` and `bench` print with --json, as far as the report shows it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from megatron_scalemoe.files import Document
from megatron_scalemoe.typed import Facts, Number

NotNegative = Annotated[Number, Field(ge=0)]


class PolicyRow(Facts):
    """A policy in the replay."""

    policy: str
    step_us: NotNegative
    dispatch_us: NotNegative
    combine_us: NotNegative
    compute_us: NotNegative
    replica_us: NotNegative | None = None
    max_over_mean_mean: NotNegative | None = None
    max_over_mean_p95: NotNegative | None = None
    bytes_scale_out: NotNegative | None = None
    wait_share: NotNegative | None = None
    migrated_bytes: NotNegative | None = None
    cost_us: NotNegative | None = None
    lower_bound_us: NotNegative | None = None
    gap: Number | None = None
    seconds: NotNegative | None = None


class SolverRow(Facts):
    """A solver's plan, or one of its runs in a benchmark."""

    solver: str
    cost_us: NotNegative
    lower_bound_us: NotNegative | None = None
    gap: Number | None = None
    seconds: NotNegative | None = None


class DispatcherRow(Facts):
    """A dispatcher that was measured."""

    dispatcher: str
    transport: str | None = None
    median_ms: NotNegative
    p90_ms: NotNegative | None = None
    ratio_to_stock: NotNegative
    bytes_out: NotNegative | None = None
    max_rel_error: NotNegative | None = None


class _Cost(Facts):
    micro_batches: int | None = Field(default=None, ge=1)


class Comparison(Facts):
    cost: _Cost = _Cost()
    rows: list[PolicyRow]


class Simulation(PolicyRow):
    cost: _Cost = _Cost()
    policy: str | None = None
    baseline: PolicyRow | None = None

    @property
    def rows(self) -> list[PolicyRow]:
        """The baseline first, unless it is the same policy."""
        return [self] if self.baseline is None or self.baseline.policy == self.policy else [self.baseline, self]


class Search(Facts):
    """One layer's search: [seconds, best cost_us so far] at each improvement, and what no placement can be below."""

    history: list[Annotated[list[Number], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    lower_bound_us: NotNegative | None = None


class PlanResult(SolverRow):
    cost: _Cost = _Cost()
    layers: list[Search] = Field(default_factory=list)

    @property
    def rows(self) -> list[SolverRow]:
        return [self]


class DispatchBench(Facts):
    rows: list[DispatcherRow]


class SolverBench(Facts):
    rows: list[SolverRow]


RESULTS = {
    "compare": Comparison,
    "simulate": Simulation,
    "plan result": PlanResult,
    "bench dispatch": DispatchBench,
    "bench solvers": SolverBench,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One layer's search: (seconds, best cost_us so far) at each improvement, and what no placement can be below, where it is known."""

    layer: int
    points: list[tuple[float, float]]
    lower_bound_us: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result file. `rows`: texts `name` (the file's) and what names the row, else floats; absent keys are left out.

    curves: of a plan's result. micro_batches: of an optimizer step, that replicas were priced for; None if the file does not say.
    """

    name: str
    rows: list[dict]
    curves: list[Curve]
    micro_batches: int | None = None


def kind_of_result(data: dict) -> str | None:
    """Which of the `RESULTS` a JSON file is, by what is in it; None if it is none of them."""
    rows = data.get("rows")
    if isinstance(rows, list) and rows and isinstance(rows[0], dict):
        first = rows[0]
        if "policy" in first:
            return "compare"
        if "dispatcher" in first and "median_ms" in first:
            return "bench dispatch"
        return "bench solvers" if "solver" in first and "seconds" in first else None
    if "step_us" in data:
        return "simulate"
    return "plan result" if "solver" in data and "cost_us" in data else None


def read_result(document: Document, kind: str, name: str) -> Result:
    """Raises `ScaleMoEError` naming file, line and field if something is missing or of the wrong kind."""
    parsed = document.parse(RESULTS[kind])
    rows = [{"name": name, **row.model_dump(exclude_none=True, exclude={"baseline", "layers", "cost"})} for row in parsed.rows]
    for row in rows if kind == "simulate" else ():
        row.setdefault("policy", name)
    searches = parsed.layers if isinstance(parsed, PlanResult) else []
    curves = [
        Curve(layer, [(seconds, cost_us) for seconds, cost_us in search.history], search.lower_bound_us or None)
        for layer, search in enumerate(searches)
        if search.history
    ]
    return Result(name, rows, curves, parsed.cost.micro_batches if isinstance(parsed, Comparison | Simulation | PlanResult) else None)
