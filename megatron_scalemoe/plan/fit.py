"""Do a plan, a trace, a cluster and a model belong together? The one check of their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from megatron_scalemoe.errors import ScaleMoEError


class Sizes(NamedTuple):
    """What a model and its job have, where no trace or plan is at hand; None for what is not known."""

    num_layers: int | None = None
    num_ranks: int | None = None
    num_experts: int | None = None


def check_fit(things: Mapping[str, object], try_: str | None = None) -> None:
    """Raises `ScaleMoEError` unless all have the layers, ranks and experts of the first, each so far as it has them.

    things: by the names that a user knows them by. Plans, traces, topologies, ports, `Sizes`: whatever has `num_layers`, `num_ranks`,
    `num_experts` or `num_logical_experts`.
    """
    (first, thing), *others = things.items()
    wanted = _sizes(thing)
    for name, other in others:
        found = _sizes(other)
        both = [what for what in wanted if what in found]
        if any(found[what] != wanted[what] for what in both):
            problem = f"{name} must be for the {_text(wanted, both)} of {first}"
            raise ScaleMoEError(problem, found=_text(found, both), try_=try_)


def _sizes(thing: object) -> dict[str, int]:
    attributes = {"layers": "num_layers", "ranks": "num_ranks", "experts": "num_experts"}
    if hasattr(thing, "num_logical_experts"):
        attributes["experts"] = "num_logical_experts"
    sizes = {what: getattr(thing, attribute, None) for what, attribute in attributes.items()}
    return {what: size for what, size in sizes.items() if size is not None}


def _text(sizes: Mapping[str, int], which: list[str]) -> str:
    """`3 layers, 4 ranks and 8 experts`."""
    texts = [f"{sizes[what]} {what}" for what in which]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
