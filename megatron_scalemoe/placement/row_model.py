"""`RowModel`: rows on the wire as linear functions of a placement, never above the true ones: what bounds and the exact solver rest on.

Deduplication makes rows a curved function of the placement. With S1 the selections of a group of experts (a rank's or a node's), and S2
the tokens with two of them, counted once per pair, Dawson and Sankoff (1967) give distinct rows >= a S1 - b S2 for each pair (a, b) =
(2/(r+1), 2/(r(r+1))), r = 1, 2, ... `LayerTraffic` with co-activation takes the largest of these, so each of them is a lower bound on it.
S2 is a sum over experts of their pairs within the group, each pair counted half for both, or whole for the lighter one; `partners` bounds
each of these. The second way leaves the heaviest expert of a group all its rows, the first is better on the whole.
Suffixes: G ranks, N nodes, E logical experts, W ways to count pairs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.placement.partners import Partners, find_partners
from megatron_scalemoe.placement.problem import LayerProblem


@dataclasses.dataclass(frozen=True, eq=False)
class RowModel:
    """Made by `row_model`. Shares x[e, g] of experts on ranks; S1, S2 of a group (a rank; or a node, see `row_model`).

    near_EG, far_EN: float64, selections that expert e draws from the other ranks of its node, from other nodes.
    counts_GE, counts_NE: float64, selections of each source rank, of each source node.
    near_part_G, far_part_N, source_part_G, source_part_N: float64, the largest part of a group's selections that can come from the other
        ranks of its node (groups on rank g), from other nodes (groups in node n), from rank g, from node n.
    near_beside_G, far_beside_N: float64, the smallest part of the selections of a group with the heaviest expert that can come from there;
        0 where groups have no fixed size.
    slots, at_least: the most and the fewest experts of a group that carry load; group_ranks: its most ranks.
    partners: bounds of the pairs, for each way to count them; none where no
        rows are saved, or experts are taken as independent.
    """

    problem: LayerProblem
    near_EG: np.ndarray
    far_EN: np.ndarray
    counts_GE: np.ndarray
    counts_NE: np.ndarray
    near_part_G: np.ndarray
    far_part_N: np.ndarray
    source_part_G: np.ndarray
    source_part_N: np.ndarray
    near_beside_G: np.ndarray
    far_beside_N: np.ndarray
    slots: int
    at_least: int
    group_ranks: int
    partners: tuple[Partners, ...]

    @property
    def depends_on_load(self) -> bool:
        """Whether a limit on the ranks' load bounds what deduplication can save."""
        return self.problem.cost.deduplicate and self.problem.traffic.topk > 1 and self.slots > 1

    def rows_at(self, largest_load: float) -> RowBounds:
        """What holds where no rank has more selections than `largest_load` (may be inf)."""
        problem, topk, limit = self.problem, self.problem.traffic.topk, largest_load * self.group_ranks
        none_1E = np.zeros((1, problem.num_experts))
        if not self.depends_on_load:
            return RowBounds(((1.0, 0.0),), none_1E)
        if not self.partners:
            return RowBounds(((_independent_factor(problem, self.slots, limit), 0.0),), none_1E)
        pairs_WE = np.stack([partners.most(limit) for partners in self.partners])
        ratio = float(_largest_ratio(pairs_WE.T, problem.load, self.at_least).min())
        best = _best_r(ratio, topk)
        floor = max(1 / topk, 2 / (best + 1) * (1 - ratio / best)) if np.isfinite(ratio) else 1 / topk
        usual = _best_r(float(pairs_WE.sum(axis=1).min()) / max(float(problem.load.sum()), 1e-300), topk)
        near_usual = [r for r in (usual - 1, usual, usual + 1) if 1 <= r < topk]
        return RowBounds(((floor, 0.0), *((2 / (r + 1), 2 / (r * (r + 1))) for r in near_usual)), pairs_WE)


@dataclasses.dataclass(frozen=True, eq=False)
class RowBounds:
    """rows: pairs (a, b): a group's rows from some (or all) sources are at least a x (selections from them) - b x (largest part that comes
    from them) x S2. All pairs hold; the first has b = 0.
    pairs_WE: float64 [W, E], for each w, S2 of a group is at most the sum of x[e, group] pairs_WE[w, e].
    """

    rows: tuple[tuple[float, float], ...]
    pairs_WE: np.ndarray


def row_model(problem: LayerProblem, *, group_ranks: tuple[int, int] = (1, 1)) -> RowModel:
    """The model of one layer. group_ranks: the fewest and the most ranks of a group within which a token travels once: (1, 1), or the
    sizes of the nodes."""
    counts_GE, ports = problem.traffic.counts, problem.ports
    in_node_GN = ports.in_node_GN
    counts_NE, load_E = in_node_GN.T @ counts_GE, problem.load
    # Mean counts are no whole numbers: their differences may come out below 0, where the ratios' iterations would never end.
    near_EG = np.maximum((counts_NE[ports.node_of_rank] - counts_GE).T, 0.0)
    far_EN = np.maximum(load_E[:, None] - counts_NE.T, 0.0)
    slots = (problem.homes_per_rank + problem.replica_slots_per_rank) * group_ranks[1]
    # Shares of replicas may leave all of a group's load to one expert.
    at_least = 1 if problem.replicas else problem.homes_per_rank * group_ranks[0]
    parts = [_largest_ratio(part, load_E, at_least) for part in (near_EG, far_EN, counts_GE.T, counts_NE.T)]
    partners: tuple[Partners, ...] = ()
    if problem.cost.deduplicate and problem.traffic.topk > 1 and problem.traffic.coactivation is not None and slots > 1:
        together_EE, heaviness_E = problem.traffic.coactivation, np.argsort(np.argsort(load_E, kind="stable"))
        with_heavier_EE = np.where(heaviness_E[:, None] < heaviness_E, together_EE, 0.0)
        ways = ((0.5 * together_EE, True), (with_heavier_EE, False))
        partners = tuple(find_partners(way_EE, load_E, slots, fractional=problem.replicas > 0, priced=priced) for way_EE, priced in ways)
    if problem.replicas or slots != at_least:
        parts += [np.zeros(problem.num_ranks), np.zeros(ports.num_nodes)]
    else:
        parts += [_smallest_ratio_beside_heaviest(part, load_E, slots) for part in (near_EG, far_EN)]
    return RowModel(problem, near_EG, far_EN, counts_GE, counts_NE, *parts, slots, at_least, group_ranks[1], partners)


def _best_r(ratio: float, topk: int) -> int:
    """The r that gives the largest bound where S2 / S1 is `ratio`."""
    return int(min(1 + np.floor(2 * min(ratio, topk)), topk - 1))


def _independent_factor(problem: LayerProblem, slots: int, largest_load: float) -> float:
    """The least distinct rows per selection: more, or heavier, experts in a group mean fewer rows per selection."""
    load_E, topk = problem.load, problem.traffic.topk
    tokens = max(load_E.sum() / topk, 1e-300)
    heaviest = np.minimum(1.0, np.sort(load_E / tokens)[::-1][:slots])
    of_heaviest = (1 - np.prod(1 - heaviest)) / heaviest.sum() if heaviest.any() else 1.0
    fullness = largest_load / tokens
    of_load = 0.0 if np.isinf(fullness) else -np.expm1(-fullness) / fullness if fullness > 0 else 1.0
    return float(max(of_heaviest, of_load, 1 / topk))


def _largest_ratio(top_EX: np.ndarray, bottom_E: np.ndarray, size: int) -> np.ndarray:
    """float64 [X]: max over sets of at least `size` experts of sum(top) / sum(bottom) (Dinkelbach 1967). Experts of zero bottom with a
    positive top make it inf."""
    if ((bottom_E <= 0)[:, None] & (top_EX > 0)).any():
        return np.full(top_EX.shape[1], np.inf)
    used = bottom_E > 0
    # Experts without selections add nothing: they may fill a set's places.
    top_EX, bottom_E, size = top_EX[used], bottom_E[used], max(1, size - int((~used).sum()))
    if not bottom_E.size:
        return np.zeros(top_EX.shape[1])
    if size == 1:
        return (top_EX / bottom_E[:, None]).max(axis=0)
    ratio_X = top_EX.sum(axis=0) / bottom_E.sum()
    while True:
        gain_EX = top_EX - ratio_X * bottom_E[:, None]
        chosen = np.argpartition(-gain_EX, size - 1, axis=0)[:size]
        better_X = np.take_along_axis(top_EX, chosen, axis=0).sum(axis=0) / bottom_E[chosen].sum(axis=0)
        if (better_X <= ratio_X * (1 + 1e-12)).all():
            return ratio_X * (1 + 1e-9)
        ratio_X = np.maximum(ratio_X, better_X)


def _smallest_ratio_beside_heaviest(top_EX: np.ndarray, load_E: np.ndarray, size: int) -> np.ndarray:
    """float64 [X]: min over sets of `size` experts with the heaviest one of sum(top) / sum(load)."""
    heaviest = int(load_E.argmax())
    if load_E[heaviest] <= 0:
        return np.zeros(top_EX.shape[1])
    top_EX, load_E = np.roll(top_EX, -heaviest, axis=0), np.roll(load_E, -heaviest)
    ratio_X = top_EX[0] / load_E[0]
    if size == 1:
        return ratio_X
    ratio_X = np.maximum(ratio_X, top_EX[:size].sum(axis=0) / load_E[:size].sum())
    while True:
        excess_EX = top_EX[1:] - ratio_X * load_E[1:, None]
        chosen = 1 + np.argpartition(excess_EX, size - 2, axis=0)[: size - 1]
        better_X = (top_EX[0] + np.take_along_axis(top_EX, chosen, axis=0).sum(axis=0)) / (load_E[0] + load_E[chosen].sum(axis=0))
        if (better_X >= ratio_X * (1 - 1e-12)).all():
            return ratio_X * (1 - 1e-9)
        ratio_X = np.minimum(ratio_X, better_X)
