"""The cost of one MoE layer: the one objective of solvers (at the ports), prices and simulation (on the links).

A phase of an exchange takes the time of its busiest link or port, the largest latency that it meets, and the fixed overhead.
Suffixes: G ranks, N nodes, E logical experts, P slots, X links or ports.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.exchange import exchange_phases
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Network
from megatron_scalemoe.cost.replicas import replica_us
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.traffic.matrices import distinct_factor, rows_between_ranks, rows_to_nodes, selections_between_ranks
from megatron_scalemoe.traffic.trace import LayerTraffic

# An exchange runs once forward and once, in the other direction, backward; so each direction is used twice.
_PASSES = 2


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerCost:
    """One layer in one micro-batch, forward and backward.

    dispatch_us, combine_us: time of the exchange to the experts and back, twice each.
    compute_us: the experts of the most loaded rank. replica_us: parameters out and gradients back, for one micro-batch.
    total_us: all of them, after overlap.
    bytes_scale_out, bytes_scale_up: sent between and inside the nodes by all exchanges (not by replicas).
    load_G: float64 [G], selections that each rank computes.
    busy_us_X: float64 [X], how long each link (or port) is busy with all exchanges.
    """

    dispatch_us: float
    combine_us: float
    compute_us: float
    replica_us: float
    total_us: float
    bytes_scale_out: float
    bytes_scale_up: float
    load_G: np.ndarray
    busy_us_X: np.ndarray

    @property
    def max_over_mean(self) -> float:
        """Of `load_G`: 1 or more."""
        return max_over_mean(self.load_G)


def max_over_mean(load_G: np.ndarray) -> float:
    """The largest load over the mean of all; 1 without any."""
    return float(load_G.max() / load_G.mean()) if load_G.any() else 1.0


def tokens_cost(
    tokens_GP: np.ndarray,
    slots_P: np.ndarray,
    traffic: LayerTraffic,
    network: Network,
    cost: CostModel,
    *,
    replica_price_us: float = 0.0,
) -> LayerCost:
    """Cost of sending `tokens_GP` [G, P] (selections of each source rank for each slot, from `split.split_tokens`).

    slots_P: int [P], the expert of each slot or EMPTY. traffic: the same step's, for distinct rows.
    replica_price_us: `replica_us` of the layer's placement. Raises `ScaleMoEError` for 2dh with nodes of different sizes.
    """
    ranks, nodes = network.node_of_rank.size, network.node_of_rank
    rows_GG = rows_between_ranks(tokens_GP, slots_P, ranks, traffic, deduplicate=cost.deduplicate)
    to_nodes_GN = rows_to_nodes(tokens_GP, slots_P, nodes, traffic) if cost.deduplicate and cost.exchange == "2dh" else None
    load_G = selections_between_ranks(tokens_GP, ranks).sum(axis=0).astype(np.float64)
    return _cost_of_rows(rows_GG, to_nodes_GN, load_G, network, cost, replica_price_us)


def shares_cost(share_EG: np.ndarray, traffic: LayerTraffic, network: Network, cost: CostModel) -> LayerCost:
    """Cost of sending the fraction `share_EG[e, g]` (float, rows sum to 1) of each expert's tokens, from every source alike, to rank g.

    For the exchanges flat and 1dh, without a price for copies.
    """
    selections_GG = traffic.counts @ share_EG
    rows_GG = selections_GG * distinct_factor(share_EG, traffic) if cost.deduplicate else selections_GG
    return _cost_of_rows(rows_GG, None, selections_GG.sum(axis=0), network, cost, 0.0)


def split_cost(
    slots_P: np.ndarray,
    home_rank_E: np.ndarray,
    hosts_EG: np.ndarray,
    traffic: LayerTraffic,
    network: Network,
    cost: CostModel,
    *,
    even: bool = False,
) -> LayerCost:
    """Cost of a layer's placement for its (mean) traffic, made whole and split over the copies as the runtime does; and their price.

    slots_P: int [P], as `tokens_cost` takes them; home_rank_E, hosts_EG: the same placement, for `replica_us`. even: see `split_tokens`.
    """
    ranks, nodes = hosts_EG.shape[1], network.node_of_rank
    tokens_GP = split_tokens(whole_counts(traffic.counts), slots_P, ranks, nodes, even=even)
    price_us = replica_us(home_rank_E, hosts_EG, cost, network)
    return tokens_cost(tokens_GP, slots_P, traffic, network, cost, replica_price_us=price_us)


def whole_counts(counts_GE: np.ndarray) -> np.ndarray:
    """int64 [G, E]: mean counts as whole tokens. Each rank keeps its total (rounded); the largest fractions are rounded up."""
    floor_GE = np.floor(counts_GE)
    fraction_GE = counts_GE - floor_GE
    up_G = np.rint(fraction_GE.sum(axis=1)).astype(np.int64)
    place_GE = np.argsort(np.argsort(-fraction_GE, axis=1, kind="stable"), axis=1)
    return floor_GE.astype(np.int64) + (place_GE < up_G[:, None])


def exchange_us(phases: list[np.ndarray], network: Network, cost: CostModel) -> tuple[float, np.ndarray]:
    """(time of all `phases` of an exchange, one after the other; float64 [X], how long each link or port is busy with them)."""
    busy_XK = [network.busy_us(phase_GG) for phase_GG in phases]
    busiest_us = sum(float(busy_X.max(initial=0.0)) for busy_X in busy_XK)
    latency_us = sum(network.latency_us(phase_GG) for phase_GG in phases)
    return busiest_us + latency_us + len(phases) * cost.exchange_overhead_us, np.sum(busy_XK, axis=0)


def _cost_of_rows(
    rows_GG: np.ndarray, to_nodes_GN: np.ndarray | None, load_G: np.ndarray, network: Network, cost: CostModel, price_us: float
) -> LayerCost:
    nodes = network.node_of_rank
    bytes_to_nodes_GN = None if to_nodes_GN is None else to_nodes_GN * cost.row_bytes
    phases = exchange_phases(rows_GG * cost.row_bytes, nodes, cost.exchange, bytes_to_nodes_GN)
    dispatch_us, out_us_X = exchange_us(phases, network, cost)
    combine_us, back_us_X = exchange_us([phase.T for phase in phases], network, cost)
    compute_us = float(load_G.max()) * cost.compute_us_per_row
    sent_GG = np.sum(phases, axis=0) * (2 * _PASSES)
    scale_out_GG = nodes[:, None] != nodes
    return LayerCost(
        dispatch_us=_PASSES * dispatch_us,
        combine_us=_PASSES * combine_us,
        compute_us=compute_us,
        replica_us=price_us,
        total_us=cost.layer_us(_PASSES * (dispatch_us + combine_us), compute_us) + price_us,
        bytes_scale_out=float(sent_GG[scale_out_GG].sum()),
        bytes_scale_up=float(sent_GG[~scale_out_GG].sum()),
        load_G=load_G,
        busy_us_X=_PASSES * (out_us_X + back_us_X),
    )
