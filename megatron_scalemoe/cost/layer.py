"""The cost of one MoE layer on the links of a cluster: the final word on a placement, where solvers work with ports.

A phase of an exchange takes the time of its most loaded link, the latency of the longest route that it uses, and the fixed overhead.
Suffixes: G ranks, N nodes, E logical experts, P slots, M links.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_scalemoe.cost.exchange import exchange_phases
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_bytes
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.plan.split import split_tokens
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.routes import Routes
from megatron_scalemoe.traffic.matrices import rows_between_ranks, rows_to_nodes, selections_between_ranks
from megatron_scalemoe.traffic.trace import LayerTraffic
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

# An exchange runs once forward and once, in the other direction, backward; so each direction is used twice.
_PASSES = 2


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerCost:
    """One layer in one micro-batch, forward and backward.

    dispatch_us, combine_us: time of the exchange to the experts and back, twice each.
    compute_us: the experts of the most loaded rank. replica_us: parameters out and gradients back, for one micro-batch.
    total_us: all of them, after overlap.
    bytes_scale_out, bytes_scale_up: sent between and inside the nodes by all exchanges (not by replicas).
    load_G: float64 [G], selections that each rank computes. max_over_mean: of `load_G`, 1 or more.
    link_time_us_M: float64 [M], how long each link is busy with all exchanges.
    """

    dispatch_us: float
    combine_us: float
    compute_us: float
    replica_us: float
    total_us: float
    bytes_scale_out: float
    bytes_scale_up: float
    max_over_mean: float
    load_G: np.ndarray
    link_time_us_M: np.ndarray


def layer_cost(
    tokens_GP: np.ndarray,
    slots_P: np.ndarray,
    traffic: LayerTraffic,
    routes: Routes,
    topology: Topology,
    cost: CostModel,
    *,
    replica_price_us: float = 0.0,
) -> LayerCost:
    """Cost of sending `tokens_GP` [G, P] (selections of each source rank for each slot, from `split.split_tokens`).

    slots_P: int [P], the expert of each slot or EMPTY. traffic: the same step's, for distinct rows.
    replica_price_us: `replica_link_us` of the layer's placement. Raises `ScaleMoEError` for 2dh with nodes of different sizes.
    """
    bytes_GG, bytes_to_nodes_GN = _exchanged_bytes(tokens_GP, slots_P, traffic, topology.node_of_rank, cost)
    phases = exchange_phases(bytes_GG, topology.node_of_rank, cost.exchange, bytes_to_nodes_GN)
    dispatch_us, out_us_M = phases_us(phases, routes, cost)
    combine_us, back_us_M = phases_us([phase.T for phase in phases], routes, cost)
    load_G = selections_between_ranks(tokens_GP, topology.num_ranks).sum(axis=0).astype(np.float64)
    compute_us = float(load_G.max()) * cost.compute_us_per_row
    sent_GG = np.sum(phases, axis=0) * (2 * _PASSES)
    scale_out = topology.node_of_rank[:, None] != topology.node_of_rank
    return LayerCost(
        dispatch_us=_PASSES * dispatch_us,
        combine_us=_PASSES * combine_us,
        compute_us=compute_us,
        replica_us=replica_price_us,
        total_us=cost.layer_us(_PASSES * (dispatch_us + combine_us), compute_us) + replica_price_us,
        bytes_scale_out=float(sent_GG[scale_out].sum()),
        bytes_scale_up=float(sent_GG[~scale_out].sum()),
        max_over_mean=float(load_G.max() / load_G.mean()) if load_G.any() else 1.0,
        load_G=load_G,
        link_time_us_M=_PASSES * (out_us_M + back_us_M),
    )


def plan_cost(
    plan: PlacementPlan,
    layer: int,
    traffic: LayerTraffic,
    routes: Routes,
    topology: Topology,
    cost: CostModel,
    *,
    even: bool = False,
) -> LayerCost:
    """Cost of one layer under a plan for its (mean) traffic, whose counts are first made whole. `even`: see `split.split_tokens`."""
    slots_P = plan.physical_to_logical[layer]
    tokens_GP = split_tokens(whole_counts(traffic.counts), slots_P, plan.num_ranks, topology.node_of_rank, even=even)
    price_us = replica_link_us(plan.home_rank[layer], plan.hosts(layer), cost, routes)
    return layer_cost(tokens_GP, slots_P, traffic, routes, topology, cost, replica_price_us=price_us)


def replica_link_us(home_rank_E: np.ndarray, hosts_EG: np.ndarray, cost: CostModel, routes: Routes) -> float:
    """As `cost.replicas.replica_us`, by the most loaded link instead of the busiest port: us for each micro-batch."""
    bytes_GG = replica_bytes(home_rank_E, hosts_EG, cost)
    if not bytes_GG.any():
        return 0.0
    return float(sum(_link_us(b, routes).max() for b in (bytes_GG, bytes_GG.T)) / cost.micro_batches)


def whole_counts(counts_GE: np.ndarray) -> np.ndarray:
    """int64 [G, E]: mean counts as whole tokens. Each rank keeps its total (rounded); the largest fractions are rounded up."""
    floor_GE = np.floor(counts_GE)
    fraction_GE = counts_GE - floor_GE
    up_G = np.rint(fraction_GE.sum(axis=1)).astype(np.int64)
    place_GE = np.argsort(np.argsort(-fraction_GE, axis=1, kind="stable"), axis=1)
    return floor_GE.astype(np.int64) + (place_GE < up_G[:, None])


def phases_us(phases: list[np.ndarray], routes: Routes, cost: CostModel) -> tuple[float, np.ndarray]:
    """(time of all `phases` of an exchange, one after the other; float64 [M], how long each link is busy with them)."""
    total_us, busy_us_M = 0.0, np.zeros(routes.link_bandwidth_GBps.size)
    for phase_GG in phases:
        link_us_M = _link_us(phase_GG, routes)
        latency_us = float(routes.latency_us[phase_GG > 0].max(initial=0.0))
        total_us += float(link_us_M.max(initial=0.0)) + latency_us + cost.exchange_overhead_us
        busy_us_M += link_us_M
    return total_us, busy_us_M


def _exchanged_bytes(
    tokens_GP: np.ndarray, slots_P: np.ndarray, traffic: LayerTraffic, node_of_rank_G: np.ndarray, cost: CostModel
) -> tuple[np.ndarray, np.ndarray | None]:
    """float64 [G, G]; and [G, N] if the exchange sends one row per (token, node)."""
    ranks = node_of_rank_G.size
    rows_GG = rows_between_ranks(tokens_GP, slots_P, ranks, traffic, deduplicate=cost.deduplicate)
    if not (cost.deduplicate and cost.exchange == "2dh"):
        return rows_GG * cost.row_bytes, None
    return rows_GG * cost.row_bytes, rows_to_nodes(tokens_GP, slots_P, node_of_rank_G, traffic) * cost.row_bytes


def _link_us(bytes_GG: np.ndarray, routes: Routes) -> np.ndarray:
    return routes.link_load(bytes_GG) / routes.link_bandwidth_GBps / BYTES_PER_US_PER_GBps
