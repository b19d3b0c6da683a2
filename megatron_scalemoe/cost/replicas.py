"""The price of replicas: parameters out to them and gradients back, once per optimizer step."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Network


def replica_bytes(home_rank_E: np.ndarray, hosts_EG: np.ndarray, cost: CostModel) -> np.ndarray:
    """float64 [G, G]: parameter bytes from rank i (the homes) to rank j (the replicas) per optimizer step; gradients take the transposed.

    home_rank_E: int [E]; hosts_EG: bool [E, G], every rank that holds the expert. The home itself costs nothing.
    """
    ranks = hosts_EG.shape[1]
    expert, rank = np.nonzero(hosts_EG)
    home = np.asarray(home_rank_E)[expert]
    copies_GG = np.bincount(home * ranks + rank, minlength=ranks * ranks).reshape(ranks, ranks)
    np.fill_diagonal(copies_GG, 0)
    return copies_GG * float(cost.expert_bytes)


def replica_us(home_rank_E: np.ndarray, hosts_EG: np.ndarray, cost: CostModel, network: Network) -> float:
    """Time of the replicas of one layer for each micro-batch, in us: the busiest port or link with the parameters out, then with the
    gradients back, shared by the micro-batches of an optimizer step. Without latency: the transfers of all layers follow each other.
    """
    bytes_GG = replica_bytes(home_rank_E, hosts_EG, cost)
    if not bytes_GG.any():
        return 0.0
    return float((network.busy_us(bytes_GG).max() + network.busy_us(bytes_GG.T).max()) / cost.micro_batches)
