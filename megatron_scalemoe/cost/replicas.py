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
    far = ports.node_of_rank[home] != ports.node_of_rank[replica]
    at_home, at_replica = (_experts_at_ports(rank, far, ports) for rank in (home, replica))
    parameters = max(ports.out.busiest(at_home), ports.into.busiest(at_replica))
    gradients = max(ports.out.busiest(at_replica), ports.into.busiest(at_home))
    return (parameters + gradients) * cost.expert_bytes / BYTES_PER_US_PER_GBps / cost.micro_batches


def _pairs(home_rank_E: np.ndarray, hosts_EG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int (R,), int (R,): home rank and replica rank of each replica."""
    expert, rank = np.nonzero(hosts_EG)
    home = np.asarray(home_rank_E)[expert]
    is_replica = home != rank
    return home[is_replica], rank[is_replica]


def _experts_at_ports(rank: np.ndarray, far: np.ndarray, ports: Ports) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replicas at each port of a side, as `PortSide.busiest` takes them: `rank` (R,) of one end, `far` (R,) whether they leave the node."""
    far_G = np.bincount(rank[far], minlength=ports.num_ranks)
    far_N = np.bincount(ports.node_of_rank[rank[far]], minlength=ports.num_nodes)
    return np.bincount(rank[~far], minlength=ports.num_ranks), far_G, far_N
