"""The price of replicas: parameters out to them and gradients back, once per optimizer step."""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.topology.ports import Ports
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


def replica_bytes(home_rank_E: np.ndarray, hosts_EG: np.ndarray, cost: CostModel) -> np.ndarray:
    """float64 [G, G]: parameter bytes from rank i (the homes) to rank j (the replicas) per optimizer step; gradients take the transposed.

    home_rank_E: int [E]; hosts_EG: bool [E, G], every rank that holds the expert. The home itself costs nothing.
    """
    ranks = hosts_EG.shape[1]
    home, replica = _pairs(home_rank_E, hosts_EG)
    return np.bincount(home * ranks + replica, minlength=ranks * ranks).reshape(ranks, ranks) * float(cost.expert_bytes)


def replica_us(home_rank_E: np.ndarray, hosts_EG: np.ndarray, cost: CostModel, ports: Ports) -> float:
    """Time of the replicas of one layer for each micro-batch, in us: the busiest port with the parameters out, then with the gradients
    back, shared by the micro-batches of an optimizer step. Without latency: the transfers of all layers follow each other.
    """
    home, replica = _pairs(home_rank_E, hosts_EG)
    if not home.size:
        return 0.0
    node_of_rank = ports.node_of_rank
    out = node_of_rank[home] != node_of_rank[replica]
    experts_per_GBps = (
        _busiest(home[~out], ports.scale_up_out_GBps, replica[~out], ports.scale_up_in_GBps),
        _busiest(home[out], ports.scale_out_out_GBps, replica[out], ports.scale_out_in_GBps),
        _busiest(node_of_rank[home[out]], ports.node_out_GBps, node_of_rank[replica[out]], ports.node_in_GBps),
    )
    parameters, gradients = np.max(experts_per_GBps, axis=0)
    return float((parameters + gradients) * cost.expert_bytes / BYTES_PER_US_PER_GBps / cost.micro_batches)


def _pairs(home_rank_E: np.ndarray, hosts_EG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int (R,), int (R,): home rank and replica rank of each replica."""
    expert, rank = np.nonzero(hosts_EG)
    home = np.asarray(home_rank_E)[expert]
    is_replica = home != rank
    return home[is_replica], rank[is_replica]


def _busiest(home: np.ndarray, out_GBps: np.ndarray, replica: np.ndarray, in_GBps: np.ndarray) -> tuple[float, float]:
    """Experts per GB/s through the busiest port: parameters home -> replica, and gradients the other way."""
    sent = np.bincount(home, minlength=out_GBps.size)
    received = np.bincount(replica, minlength=in_GBps.size)
    parameters = max((sent / out_GBps).max(), (received / in_GBps).max())
    gradients = max((received / out_GBps).max(), (sent / in_GBps).max())
    return parameters, gradients
