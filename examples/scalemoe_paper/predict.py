"""The model of an iteration: two constants fitted on two cells of Table II, everything else predicted.

    baseline      = non-communication + padded exchanges (bandwidth)
    later stages  = non-communication + ragged exchanges (bandwidth) + time per row that leaves its rank

Non-communication time is published. The capacity that Tutel pads to is fitted on the baseline's cell of the homogeneous BERT column, the
time per remote row on the cell below it. Suffixes: R ragged stages (all but the baseline), S stages, W networks, C columns.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from network import NETWORKS, load_network, padded_s, ragged_s, remote_rows
from paper import COLUMNS, COMMUNICATION_SHARE, EXPERTS, LOCAL_SHARE_BY_REPLICAS, REPLICAS, STAGES, TOKENS_PER_RANK, TOPK
from remap import remap
from workload import after_clustering, before_clustering

from megatron_scalemoe.cost.network import Links

# Stage and column of the two cells.
CAPACITY_CELL, ROW_CELL = (0, 0), (1, 0)
FITTED_SC = np.zeros((len(STAGES), len(COLUMNS)), dtype=bool)
FITTED_SC[[CAPACITY_CELL[0], ROW_CELL[0]], [CAPACITY_CELL[1], ROW_CELL[1]]] = True
# The network of each column. BERT and GPT have equal sizes, so they are predicted to be equal.
NETWORK_OF_COLUMN = [NETWORKS.index(column.split()[0]) for column in COLUMNS]


@dataclasses.dataclass(frozen=True, eq=False)
class Simulated:
    """What the package computes, before anything is fitted.

    link_s_RW: float64 [3, 2], how long an iteration's ragged exchanges keep the links busy. remote_rows_R: float64 [3], rows that leave an
    average rank in all of them. padded_s_W1, padded_s_W2: float64 [2], as link_s of the baseline with 1 and 2 rows of capacity.
    most_tokens: the largest number of tokens of one rank that choose the same expert: the capacity that loses none.
    """

    link_s_RW: np.ndarray
    remote_rows_R: np.ndarray
    padded_s_W1: np.ndarray
    padded_s_W2: np.ndarray
    most_tokens: int

    def padded_s(self, capacity: float) -> np.ndarray:
        """float64 [2]: seconds of the baseline's exchanges in each network. Bandwidth and latency make it a straight line."""
        return self.padded_s_W1 + (capacity - 1) * (self.padded_s_W2 - self.padded_s_W1)


@dataclasses.dataclass(frozen=True)
class Constants:
    """non_communication_s: published. capacity (rows per rank and expert) and us_per_remote_row: fitted."""

    non_communication_s: float
    capacity: int
    us_per_remote_row: float

    @property
    def padding_factor(self) -> float:
        """Rows sent per row that a token asked for."""
        return self.capacity * EXPERTS / (TOKENS_PER_RANK * TOPK)


def simulate(*, local_share: float = LOCAL_SHARE_BY_REPLICAS[REPLICAS], seed: int = 0) -> Simulated:
    """Runs the workloads through both networks."""
    networks = [load_network(name) for name in NETWORKS]
    before, clustered = before_clustering(seed), after_clustering(local_share, seed)
    remapped = [remap(clustered, network, seed) for network in networks]
    stages = [[before] * len(networks), [clustered] * len(networks), remapped]
    return Simulated(
        link_s_RW=np.array([[ragged_s(w, n) for w, n in zip(stage, networks, strict=True)] for stage in stages]),
        remote_rows_R=np.array([remote_rows(stage[0]) for stage in stages]),
        padded_s_W1=_padded_s(1, networks),
        padded_s_W2=_padded_s(2, networks),
        most_tokens=int(before.trace.counts.max()),
    )


def _padded_s(capacity: int, networks: list[Links]) -> np.ndarray:
    return np.array([padded_s(capacity, network) for network in networks])


def fit(simulated: Simulated, baseline_s: float, adaptive_s: float) -> Constants:
    """The constants that give these two cells of the homogeneous network; the capacity to the nearest row."""
    non_communication_s = (1 - COMMUNICATION_SHARE) * baseline_s
    first_s, each_s = simulated.padded_s_W1[0], (simulated.padded_s_W2 - simulated.padded_s_W1)[0]
    capacity = round(1 + (baseline_s - non_communication_s - first_s) / each_s)
    rows_s = adaptive_s - non_communication_s - simulated.link_s_RW[0, 0]
    return Constants(non_communication_s, capacity, float(rows_s / simulated.remote_rows_R[0] * 1e6))


def predict(simulated: Simulated, constants: Constants) -> np.ndarray:
    """float64 [S, C]: seconds per iteration of every stage in every column."""
    rows_s_R1 = constants.us_per_remote_row * simulated.remote_rows_R[:, None] / 1e6
    communication_s_SW = np.vstack([simulated.padded_s(constants.capacity), simulated.link_s_RW + rows_s_R1])
    return constants.non_communication_s + communication_s_SW[:, NETWORK_OF_COLUMN]


def predict_from(simulated: Simulated, paper_s_SC: np.ndarray) -> tuple[Constants, np.ndarray]:
    """Fits on the two cells of `paper_s_SC` and reads no other."""
    constants = fit(simulated, float(paper_s_SC[CAPACITY_CELL]), float(paper_s_SC[ROW_CELL]))
    return constants, predict(simulated, constants)
