"""Synthetic routing traces: workloads of known skew, drift, affinity and bursts, made without a model."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.traffic.matrices import coactivation_fits
from megatron_scalemoe.traffic.memory import check_memory
from megatron_scalemoe.traffic.synthetic_draw import draw_counts, expected_coactivation
from megatron_scalemoe.traffic.synthetic_popularity import (
    RECORDED_DRIFT,
    RECORDED_NOISE,
    capped,
    drifting,
    recorded_base,
    with_bursts,
    zipf,
)
from megatron_scalemoe.traffic.trace import MAX_EXPERTS, RoutingTrace
from megatron_scalemoe.version import __version__

EXPERTS_PER_GROUP = 8

# What each kind is when nothing else is asked for. `recorded`: the shape of the public training trace (docs/planner.md, "Synthetic
# traces"), whose iterations are 10 apart.
_COMMON = {"ranks": 8, "experts": 64, "layers": 1, "topk": 2, "steps": 8, "tokens_per_rank": 4096, "skew": 0.8, "drift": 0.02}
_COMMON |= {"affinity": 0.0, "source_affinity": 0.0, "interval": 1}
DEFAULTS = {
    "zipf": _COMMON,
    "clustered": _COMMON | {"affinity": 0.7, "source_affinity": 0.3},
    "bursty": _COMMON,
    "single_hot": _COMMON | {"skew": 0.0, "drift": 0.0},
    "recorded": _COMMON
    | {"ranks": 16, "experts": 32, "layers": 8, "steps": 51, "tokens_per_rank": 2048, "skew": None, "drift": 0.04, "interval": 10},
}


def synthesize(
    kind: str = "zipf",
    ranks: int | None = None,
    experts: int | None = None,
    layers: int | None = None,
    topk: int | None = None,
    steps: int | None = None,
    tokens_per_rank: int | None = None,
    skew: float | None = None,
    drift: float | None = None,
    seed: int = 0,
    *,
    affinity: float | None = None,
    source_affinity: float | None = None,
    groups: int | None = None,
    interval: int | None = None,
    coactivation: bool | None = None,
) -> RoutingTrace:
    """A trace of `kind`; what is None takes the kind's value in `DEFAULTS`. Every token chooses `topk` distinct experts.

    kind: `zipf`; `clustered`: Zipf, with experts in groups; `bursty`: Zipf, with one expert in ten times its demand now and then;
        `single_hot`: every token chooses one and the same expert; `recorded`: as skewed and as restless as a public training trace.
    skew: exponent of the Zipf popularity (expected share of the i-th expert proportional to i^-skew, at most one selection per token).
    drift: expected total variation of a layer's popularity between consecutive steps; sampling adds its noise to what is measured.
    affinity: 0..1, how strongly the experts of a group are chosen together. source_affinity: 0..1, how strongly a rank's tokens prefer its
        own group. groups: how many (default: of 8 experts each); they are drawn at random, so that contiguous placement is not the best.
    interval: training iterations from one recorded step to the next.
    coactivation: with the expected co-activation; None: where it takes no more than 64 MiB.

    Deterministic for a seed. Raises `ScaleMoEError` naming the parameter that is out of range, or the sizes that do not fit in
    memory.
    """
    given = {name: value for name, value in locals().items() if name in _COMMON and value is not None}
    if kind not in DEFAULTS:
        raise ScaleMoEError(f"must be one of {', '.join(DEFAULTS)}", found=repr(kind), field=("kind",))
    if kind == "recorded" and skew is not None:
        problem = "does not apply to the kind recorded: its layers have the skew of the recorded run"
        raise ScaleMoEError(problem, found=skew, field=("skew",))
    if kind == "single_hot" and drift:
        problem = "does not apply to the kind single_hot: every token chooses the hot expert in every step"
        raise ScaleMoEError(problem, found=drift, field=("drift",))
    values = DEFAULTS[kind] | given
    if groups is None:
        groups = max(1, values["experts"] // EXPERTS_PER_GROUP) if values["affinity"] or values["source_affinity"] else 1
    _check(values, groups, seed)
    if coactivation is None:
        coactivation = values["topk"] > 1 and coactivation_fits(values["layers"], values["experts"])
    sizes = ", ".join(f"{name} {values[name]}" for name in ("steps", "layers", "ranks", "experts"))
    sizes = f"a trace of {sizes}{', with co-activation' if coactivation else ''}"
    check_memory(peak_bytes(values, groups, coactivation), sizes, try_="smaller sizes, or --no-coactivation")
    rng = np.random.default_rng(seed)
    popularity_SLE = _popularity(kind, values, rng)
    layers_drawn = [_draw_layer(popularity_SLE[:, layer], values, groups, coactivation, rng) for layer in range(values["layers"])]
    counts = np.stack([counts_SGE for counts_SGE, _ in layers_drawn], axis=1)
    together = np.stack([pairs_EE for _, pairs_EE in layers_drawn]) if coactivation else None
    meta = {name: values[name] for name in ("topk", "tokens_per_rank", "skew", "drift", "affinity", "source_affinity")}
    meta |= {"source": f"synthetic {kind}", "seed": seed, "groups": groups, "version": __version__}
    meta["iterations"] = [step * values["interval"] for step in range(values["steps"])]
    return RoutingTrace(counts, together, meta)


def peak_bytes(values: dict, groups: int, coactivation: bool) -> int:
    """What `synthesize` needs at most, counted in the arrays of each size that are there at once."""
    steps, layers, ranks, experts = (values[name] for name in ("steps", "layers", "ranks", "experts"))
    popularity = 8 * 7 * steps * layers * experts
    result = 4 * 2 * steps * layers * ranks * experts + coactivation * 8 * 3 * layers * experts**2
    drawing = 8 * 9 * steps * ranks * experts + 8 * 5 * steps * groups * experts + coactivation * 8 * 6 * experts**2
    return popularity + result + drawing


def _check(values: dict, groups: int, seed: int) -> None:
    for name in ("ranks", "experts", "layers", "topk", "steps", "tokens_per_rank", "interval"):
        if values[name] < 1:
            raise ScaleMoEError("must be 1 or more", found=values[name], field=(name,))
    if values["experts"] > MAX_EXPERTS:
        raise ScaleMoEError(f"must be at most {MAX_EXPERTS}", found=values["experts"], field=("experts",))
    if values["topk"] > values["experts"]:
        raise ScaleMoEError("must be at most the number of experts", found=f"{values['topk']} of {values['experts']}", field=("topk",))
    if values["skew"] is not None and not 0 <= values["skew"] <= 5:
        raise ScaleMoEError("must be from 0 (uniform) to 5", found=values["skew"], field=("skew",))
    for name in ("drift", "affinity", "source_affinity"):
        if not 0 <= values[name] <= 1:
            raise ScaleMoEError("must be from 0 to 1", found=values[name], field=(name,))
    if not 1 <= groups <= values["experts"]:
        raise ScaleMoEError(f"must be from 1 to the {values['experts']} experts", found=groups, field=("groups",))
    if seed < 0:
        raise ScaleMoEError("must be 0 or more", found=seed, field=("seed",))
    if values["tokens_per_rank"] * values["ranks"] * values["topk"] > np.iinfo(np.int32).max:
        raise ScaleMoEError("times ranks and topk must fit int32", found=values["tokens_per_rank"], field=("tokens_per_rank",))


def _popularity(kind: str, values: dict, rng: np.random.Generator) -> np.ndarray:
    """float64 [S, L, E], experts in random order."""
    layers, experts, topk = values["layers"], values["experts"], values["topk"]
    drift_L, noise = np.full(layers, values["drift"]), 0.0
    if kind == "recorded":
        base_LE, noise = recorded_base(layers, experts, topk), RECORDED_NOISE
        drift_L = drift_L * np.linspace(*RECORDED_DRIFT, layers)
    elif kind == "single_hot":
        # After the cap every token's first choice; the others share the second choices, if there are any.
        base_LE = np.tile(np.concatenate([[1.0 - 1e-3], zipf(experts - 1, values["skew"]) * 1e-3])[:experts], (layers, 1))
    else:
        base_LE = np.tile(zipf(experts, values["skew"]), (layers, 1))
    popularity_SLE = drifting(rng.permuted(base_LE, axis=1), values["steps"], drift_L, noise, rng)
    return with_bursts(popularity_SLE, rng) if kind == "bursty" else popularity_SLE


def _draw_layer(
    popularity_SE: np.ndarray, values: dict, groups: int, coactivation: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """int32 [S, G, E] counts of one layer, and its co-activation [E, E].

    A token is of the kind of one group Z: part `affinity` of its choices falls inside, the rest anywhere. Groups are as frequent as they
    are popular, so that all tokens together have the popularity asked for (but for the cap and the sources' own groups).
    """
    ranks, topk, affinity, own = values["ranks"], values["topk"], values["affinity"], values["source_affinity"]
    steps, experts = popularity_SE.shape
    member_EZ = rng.permutation(np.arange(experts) % groups)[:, None] == np.arange(groups)
    mass_SZ = popularity_SE @ member_EZ
    inside_SZE = member_EZ.T / np.maximum(mass_SZ, np.finfo(float).tiny)[:, :, None]
    chosen_SZE = capped(popularity_SE[:, None] * (1.0 - affinity + affinity * inside_SZE), topk)
    own_GZ = np.arange(ranks)[:, None] * groups // ranks == np.arange(groups)
    kind_SGZ = (1.0 - own) * mass_SZ[:, None] + own * own_GZ
    chosen_SGE = np.broadcast_to(chosen_SZE, (steps, ranks, experts)) if groups == 1 else kind_SGZ @ chosen_SZE
    counts_SGE = draw_counts(chosen_SGE, values["tokens_per_rank"], topk, rng).astype(np.int32)
    if not coactivation:
        return counts_SGE, None
    weight_SZ = kind_SGZ.sum(axis=1) * values["tokens_per_rank"]
    load_E = counts_SGE.sum(axis=(0, 1)).astype(np.float64)
    return counts_SGE, expected_coactivation(chosen_SZE.reshape(-1, experts), weight_SZ.reshape(-1), load_E, topk)
