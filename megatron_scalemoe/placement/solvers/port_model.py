"""`PortModel`: a layer's constants arranged for search, so that a placement's cost follows from a few sums per rank.

What rank g receives depends on its own experts only: the selections that they draw from the rest of its node and from other nodes
(additive), and the factor by which deduplication shrinks them (from the additive pairs, or logarithms of missed tokens).
Suffixes: K any number of ranks (of candidate swaps, say), G ranks, N nodes, E logical experts, D directions.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# An expert that takes every token would have log 0 of them missed, and nothing could be taken from that again.
_LEAST_MISSED = 1e-30


@dataclasses.dataclass(frozen=True, eq=False)
class PortModel:
    """Made by `port_model(problem)`.

    draw_3EG: float64 [3, E, G], the selections that expert e would draw to rank g: all, from the rest of g's node, from other nodes.
    counts_EG: float64 [E, G], selections by source.
    pairs_EE: float64 [E, E] or None, co-activation, where rows are deduplicated by it.
    log_missed_E: float64 [E], log of the share of tokens that do not choose e.
    near_in_DG, far_in_DG, near_out_DG, far_out_DG, node_in_DN, node_out_DN: float64, us per row at each port, all exchanges of that kind
        together. D is dispatch and combine, which turns in and out around; or 1 for both, where every port is the same both ways.
    """

    cost: CostModel
    topk: int
    tokens: float
    node_of_rank_G: np.ndarray
    in_node_GN: np.ndarray
    draw_3EG: np.ndarray
    counts_EG: np.ndarray
    pairs_EE: np.ndarray | None
    log_missed_E: np.ndarray
    near_in_DG: np.ndarray
    far_in_DG: np.ndarray
    near_out_DG: np.ndarray
    far_out_DG: np.ndarray
    node_in_DN: np.ndarray
    node_out_DN: np.ndarray

    def factor(self, selections_K: np.ndarray, together_K: np.ndarray) -> np.ndarray:
        """`traffic.matrices.distinct_factor` of ranks: float64 [K]. together_K: pairs on the rank, or the sum of log_missed_E there."""
        if self.topk == 1:
            return np.ones_like(selections_K)
        safe_K = np.where(selections_K > 0, selections_K, 1.0)
        if self.pairs_EE is None:
            factor_K = -self.tokens * np.expm1(together_K) / safe_K
        else:
            pairs_K = together_K / safe_K
            r_K = np.clip(1.0 + np.floor(2.0 * pairs_K), 1, self.topk - 1)
            factor_K = 2.0 / (r_K + 1.0) * (1.0 - pairs_K / r_K)
        return np.where(selections_K > 0, np.clip(factor_K, 1.0 / self.topk, 1.0), 1.0)

    def receive_us(self, rank_K: np.ndarray, sums_3K: np.ndarray, factor_K: np.ndarray) -> np.ndarray:
        """float64 [D, K]: time of the in-ports of ranks whose experts draw `sums_3K`."""
        near_DK, far_DK = self.near_in_DG[:, rank_K], self.far_in_DG[:, rank_K]
        return np.maximum(near_DK * (sums_3K[1] * factor_K), far_DK * (sums_3K[2] * factor_K))

    def layer_us(self, exchange_DK: np.ndarray, max_load_K: np.ndarray) -> np.ndarray:
        """float64 [K]: dispatch, combine and compute together, after overlap, without latency."""
        communication_K = exchange_DK.sum(axis=0) + 4 * self.cost.exchange_overhead_us
        compute_K = max_load_K * self.cost.compute_us_per_row
        return communication_K + compute_K - self.cost.overlap * np.minimum(communication_K, compute_K)


def port_model(problem: LayerProblem) -> PortModel:
    """The constants of one layer."""
    traffic, ports, cost = problem.traffic, problem.ports, problem.cost
    in_node_GN = ports.in_node_GN
    counts_EG = np.ascontiguousarray(traffic.counts.T)
    load_E = problem.load
    own_node_EG = (counts_EG @ in_node_GN)[:, ports.node_of_rank]
    all_EG = np.broadcast_to(load_E[:, None], counts_EG.shape)
    tokens = load_E.sum() / traffic.topk
    missed_E = 1.0 - np.minimum(1.0, load_E / max(tokens, 1e-300))
    topk = traffic.topk if cost.deduplicate else 1
    return PortModel(
        cost=cost,
        topk=topk,
        tokens=tokens,
        node_of_rank_G=ports.node_of_rank,
        in_node_GN=in_node_GN,
        draw_3EG=np.stack([all_EG, own_node_EG - counts_EG, load_E[:, None] - own_node_EG]),
        counts_EG=counts_EG,
        pairs_EE=traffic.coactivation if topk > 1 else None,
        log_missed_E=np.log(np.maximum(missed_E, _LEAST_MISSED)),
        **_us_per_row(problem),
    )


def _us_per_row(problem: LayerProblem) -> dict[str, np.ndarray]:
    ports = problem.ports
    # Forward and backward: each exchange happens twice.
    us_GBps = 2 * problem.cost.row_bytes / BYTES_PER_US_PER_GBps
    names = ("near_in_DG", "far_in_DG", "node_in_DN")
    into = {name: us_GBps / np.stack(pair) for name, *pair in zip(names, ports.into, ports.out, strict=True)}
    if ports.same_both_ways:
        into = {name: 2 * both[:1] for name, both in into.items()}
    return {**into, **{name.replace("_in_", "_out_"): both[::-1] for name, both in into.items()}}
