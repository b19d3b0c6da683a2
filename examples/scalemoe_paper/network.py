"""The paper's two networks, and how long one iteration's exchanges keep their links busy. Everything here is the package's own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from paper import BYTES_PER_VALUE, EXPERTS, HIDDEN_SIZE, LAYERS, RANKS, TOKENS_PER_RANK, TOPK
from workload import Workload

from megatron_scalemoe.cost.exchange import exchange_phases, padded_rows
from megatron_scalemoe.cost.layer import exchange_us
from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.network import Links
from megatron_scalemoe.cost.plan import plan_cost
from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.topology.topology_file import load_topology

_TOPOLOGIES = Path(__file__).resolve().parent.parent / "topologies"
NETWORKS = ("homogeneous", "heterogeneous")
# As DeepSpeed and Tutel send: one row per (token, expert).
_COST = CostModel(hidden_size=HIDDEN_SIZE, ffn_hidden_size=4 * HIDDEN_SIZE, gated=False, bytes_per_value=BYTES_PER_VALUE, deduplicate=False)
# Dispatch and combine, forward and backward, in each layer.
EXCHANGES = 4 * LAYERS


def load_network(name: str) -> Links:
    """`homogeneous`: 4 p4d nodes at 100 Gb/s. `heterogeneous`: one of them at 50 Gb/s."""
    return Links(load_topology(_TOPOLOGIES / f"p4d_{name}.yaml"))


def padded_s(capacity: int, network: Links) -> float:
    """Tutel: 2DH exchanges of `capacity` rows for each (rank, expert), whatever the tokens chose. Seconds per iteration."""
    bytes_GG = padded_rows(RANKS, EXPERTS // RANKS, capacity) * _COST.row_bytes
    phases = exchange_phases(bytes_GG, network.node_of_rank, "2dh")
    dispatch_us, combine_us = (exchange_us(p, network, _COST)[0] for p in (phases, [phase.T for phase in phases]))
    return EXCHANGES / 2 * (dispatch_us + combine_us) / 1e6


def ragged_s(workload: Workload, network: Links) -> float:
    """Flat exchanges of the chosen rows only, between the experts' homes. Seconds per iteration."""
    hosts_LEG = workload.home_rank_LE[:, :, None] == np.arange(RANKS)
    plan = PlacementPlan.from_hosts(workload.home_rank_LE, hosts_LEG, replica_slots_per_rank=0)
    layers = plan_cost(plan, workload.trace, network, _COST).layers
    return sum(layer.dispatch_us + layer.combine_us for layer in layers) / 1e6


def remote_rows(workload: Workload) -> float:
    """Rows that leave an average rank in all exchanges of an iteration."""
    return EXCHANGES * TOKENS_PER_RANK * TOPK * (1 - workload.local_share)
