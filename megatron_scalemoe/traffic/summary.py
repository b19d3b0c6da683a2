"""What a routing trace looks like in numbers: skew, drift, and what the source rank says about the expert."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.traffic.trace import RoutingTrace

DRIFT_LAGS = (1, 5, 50)
TOP = 5
_FIGURES = ("gini", "max_over_mean_experts", "max_over_mean_ranks", "top5_share", "dead_experts", "drift_noise")
_FIGURES += ("source_variation", "source_noise", "local_share")


def summarize(trace: RoutingTrace) -> dict:
    """Plain numbers: the trace's size, `total` (mean over the layers) and `per_layer`, with the same keys; each the mean over the steps.
    Steps and layers without tokens are left out of the means (`idle_steps`, `empty_layers`: how many); an empty layer has None everywhere.

    gini: of the experts' loads (0 even, towards 1 one takes all). max_over_mean_experts, max_over_mean_ranks: busiest over mean load, of
    the experts, and of the ranks under contiguous placement (None unless the experts are a multiple of the ranks). top5_share: selections
    of the 5 busiest experts. dead_experts: fraction of experts without a token. drift_N: total variation between the loads of a step and
    N steps later (None when no two such steps have tokens); drift_noise: what it would be if only the draw of the tokens differed.
    source_variation: total variation between the loads of one source rank and of all, over the whole trace; source_noise: what it would be
    if all were alike. local_share: selections whose expert is on their own rank under contiguous placement (1 / ranks when the rank says
    nothing about the expert).
    """
    busy_SL = trace.busy_SL if trace.busy_SL.any() else ~trace.busy_SL
    layers = [_layer_summary(trace.counts[:, layer], busy_SL[:, layer]) for layer in range(trace.num_layers)]
    size = {"steps": trace.num_steps, "layers": trace.num_layers, "ranks": trace.num_ranks, "experts": trace.num_experts}
    tokens = float(trace.counts.sum(dtype=np.int64)) / (busy_SL.sum() * trace.topk)
    size |= {"topk": trace.topk, "tokens_per_step": tokens, "coactivation": trace.coactivation is not None}
    size |= {"idle_steps": trace.num_idle_steps, "empty_layers": int((~busy_SL.any(axis=0)).sum())}
    known = {key: [one[key] for one in layers if one[key] is not None] for key in layers[0]}
    total = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    return {**size, "total": total, "per_layer": [{"layer": index, **one} for index, one in enumerate(layers)]}


def _layer_summary(counts_SGE: np.ndarray, busy_S: np.ndarray) -> dict:
    ranks, experts = counts_SGE.shape[1:]
    drift = _drift(_shares(counts_SGE.sum(axis=1, dtype=np.float64)), busy_S)
    counts_SGE = counts_SGE[busy_S]
    if not len(counts_SGE):
        return dict.fromkeys((*_FIGURES, *drift))
    load_SE = counts_SGE.sum(axis=1, dtype=np.float64)
    share_SE = _shares(load_SE)
    ordered_SE = np.sort(share_SE, axis=1)
    by_source_GE = counts_SGE.sum(axis=0, dtype=np.float64)
    share_E = _shares(by_source_GE.sum(axis=0))
    summary = {
        "gini": float(gini(load_SE).mean()),
        "max_over_mean_experts": float(ordered_SE[:, -1].mean() * experts),
        "max_over_mean_ranks": None,
        "top5_share": float(ordered_SE[:, -TOP:].sum(axis=1).mean()),
        "dead_experts": float((load_SE == 0).mean()),
        "drift_noise": _sampling_noise(share_E, 2.0 / max(load_SE.sum(axis=1).mean(), 1.0)),
        "source_variation": float(total_variation(_shares(by_source_GE), share_E).mean()),
        "source_noise": _sampling_noise(share_E, (1.0 - 1.0 / ranks) / max(by_source_GE.sum() / ranks, 1.0)),
        "local_share": None,
    }
    assert tuple(summary) == _FIGURES
    if experts % ranks == 0:
        summary["max_over_mean_ranks"] = float(share_SE.reshape(len(share_SE), ranks, -1).sum(axis=2).max(axis=1).mean() * ranks)
        own_G = by_source_GE.reshape(ranks, ranks, -1).sum(axis=2).diagonal()
        summary["local_share"] = float(own_G.sum() / max(by_source_GE.sum(), 1.0))
    return summary | drift


def _drift(share_SE: np.ndarray, busy_S: np.ndarray) -> dict[str, float | None]:
    drift = {}
    for lag in DRIFT_LAGS:
        both = busy_S[lag:] & busy_S[:-lag]
        moved = total_variation(share_SE[lag:][both], share_SE[:-lag][both])
        drift[f"drift_{lag}"] = float(moved.mean()) if moved.size else None
    return drift


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient of loads [..., E] along the last axis: 0 when all are alike, towards 1 when one has all; 0 without any."""
    ordered = np.sort(load, axis=-1)
    experts = load.shape[-1]
    total = ordered.sum(axis=-1)
    weighted = ordered @ np.arange(1, experts + 1)
    return np.where(total > 0, 2.0 * weighted / (experts * np.where(total > 0, total, 1.0)) - (experts + 1) / experts, 0.0)


def total_variation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Half the absolute difference of two distributions, along the last axis: the fraction of tokens that went elsewhere."""
    return 0.5 * np.abs(first - second).sum(axis=-1)


def _shares(load: np.ndarray) -> np.ndarray:
    total = load.sum(axis=-1, keepdims=True)
    return load / np.where(total > 0, total, 1.0)


def _sampling_noise(share_E: np.ndarray, per_selection: float) -> float:
    """Expected total variation when each difference is normal with variance share x (1 - share) x `per_selection`."""
    return float(0.5 * np.sqrt(2.0 / np.pi * share_E * (1.0 - share_E) * per_selection).sum())
