"""Topology-aware remapping: which cluster goes to which rank, by the package's genetic algorithm (ScaleMoE's, with our fitness).

A cluster moves with its sequences and its experts, so what stays on a rank stays there; only the traffic between nodes changes.
Suffixes: L layers, C clusters (as many as ranks), G ranks, N nodes, E experts.
"""

from __future__ import annotations

import numpy as np
from paper import RANKS, TOPK
from workload import Workload

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.placement.budget import Budget
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.solvers.genetic import solve_genetic
from megatron_scalemoe.traffic.trace import LayerTraffic, RoutingTrace


def remap(workload: Workload, network: Links, seed: int) -> Workload:
    """The same clusters on better ranks, in all layers alike: never busier at the nodes' ports than before."""
    rank_of_cluster_C = best_ranks(rows_between_clusters(workload), network, seed)
    counts = np.empty_like(workload.trace.counts)
    counts[:, :, rank_of_cluster_C] = workload.trace.counts
    return Workload(RoutingTrace(counts, meta=workload.trace.meta), rank_of_cluster_C[workload.home_rank_LE])


def rows_between_clusters(workload: Workload) -> np.ndarray:
    """float64 [L, C, C]: rows from the sequences of cluster i to the experts of cluster j. Cluster i is on rank i."""
    lives_on_LEC = workload.home_rank_LE[:, :, None] == np.arange(RANKS)
    return workload.trace.counts[0] @ lives_on_LEC.astype(np.float64)


def best_ranks(rows_LCC: np.ndarray, network: Links, seed: int) -> np.ndarray:
    """int64 [C]: the rank of each cluster."""
    mean_CC = rows_LCC.mean(axis=0)
    traffic = LayerTraffic(mean_CC, None, mean_CC.sum(axis=0)[None], TOPK)
    problem = LayerProblem(traffic=traffic, ports=network.ports, cost=CostModel(deduplicate=False))

    def fitness(_: LayerProblem, rank_C: np.ndarray) -> float:
        return busiest_ports(rows_LCC, rank_C, network)

    return solve_genetic(problem, rng=np.random.default_rng(seed), budget=Budget(effort=2.5), fitness=fitness)


def busiest_ports(rows_LCC: np.ndarray, rank_C: np.ndarray, network: Links) -> float:
    """Rows per GB/s at the busiest node port, dispatch and combine, summed over the layers: what remapping can change."""
    ports = network.ports
    on_node_CN = ports.in_node_GN[rank_C]
    rows_LNN = (on_node_CN.T @ rows_LCC @ on_node_CN) * (1 - np.eye(ports.num_nodes))
    sent_LN, received_LN = rows_LNN.sum(axis=2), rows_LNN.sum(axis=1)
    directions = ((sent_LN, received_LN), (received_LN, sent_LN))
    return float(sum(np.maximum(out / ports.out.node_GBps, into / ports.into.node_GBps).max(axis=1).sum() for out, into in directions))
