"""One exchange as the phases that a dispatcher sends it in: each phase is a matrix [G, G] of the bytes from rank to rank.

All rows of a phase travel at once; a phase starts when the one before it has ended. The transposed phases are those of the way back.
Ranks of a node are numbered by their order: the first one is its leader, and "local number" is the position within the node.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError


def exchange_phases(
    bytes_GG: np.ndarray, node_of_rank_G: np.ndarray, exchange: str, bytes_to_nodes_GN: np.ndarray | None = None
) -> list[np.ndarray]:
    """The phases, each float64 [G, G] with a zero diagonal, of an exchange of `bytes_GG` (rank i, a row, to rank j, a column).

    `flat`: every rank to every rank, one phase.
    `1dh`: all that leaves a node goes to its leader, the leaders exchange, and each scatters to its node; the rest goes directly, with
        the first phase (Hetu).
    `2dh`: inside the node to the rank with the destination's local number, then between ranks of equal local number (Tutel).
    `2dh` with `bytes_to_nodes_GN` (float [G, N], with one row per token and node): each row once to the rank of equal local number in each
        node where it has a destination, then inside that node to its destinations (the order of DeepEP).

    Within one node every exchange is flat. Raises `ScaleMoEError` for 2dh between nodes of different sizes.
    """
    node_of_rank = np.asarray(node_of_rank_G)
    if exchange == "flat" or not node_of_rank.any():
        phases = [bytes_GG]
    elif exchange == "1dh":
        phases = _through_leaders(bytes_GG, node_of_rank)
    elif bytes_to_nodes_GN is None:
        phases = _inside_then_between(bytes_GG, _ranks_by_node(node_of_rank))
    else:
        phases = _between_then_inside(bytes_GG, bytes_to_nodes_GN, node_of_rank, _ranks_by_node(node_of_rank))
    return [_without_diagonal(phase) for phase in phases]


def padded_rows(num_ranks: int, slots_per_rank: int, capacity: int) -> np.ndarray:
    """float64 [G, G]: rows of an exchange padded to `capacity` rows per (source rank, slot), as DeepSpeed and Tutel send it: whatever
    the tokens chose, each rank sends the same to each rank. The diagonal stays on its rank.
    """
    return np.full((num_ranks, num_ranks), float(slots_per_rank * capacity))


def _through_leaders(bytes_GG: np.ndarray, node_of_rank: np.ndarray) -> list[np.ndarray]:
    leader_of_rank = np.unique(node_of_rank, return_index=True)[1][node_of_rank]
    outside = node_of_rank[:, None] != node_of_rank
    leaves_GG = np.where(outside, bytes_GG, 0.0)
    to_leader_GG = np.eye(node_of_rank.size)[leader_of_rank]  # [i, j]: j is the leader of i
    gather = bytes_GG - leaves_GG + leaves_GG.sum(axis=1)[:, None] * to_leader_GG
    between_leaders = to_leader_GG.T @ leaves_GG @ to_leader_GG
    scatter = leaves_GG.sum(axis=0)[:, None] * to_leader_GG
    return [gather, between_leaders, scatter.T]


def _inside_then_between(bytes_GG: np.ndarray, ranks_NK: np.ndarray) -> list[np.ndarray]:
    nodes, size = ranks_NK.shape
    order = ranks_NK.reshape(-1)
    blocks = bytes_GG[np.ix_(order, order)].reshape(nodes, size, nodes, size)
    inside = np.zeros_like(blocks)
    between = np.zeros_like(blocks)
    node, local = np.arange(nodes), np.arange(size)
    inside[node, :, node, :] = blocks.sum(axis=2)
    between[:, local, :, local] = blocks.sum(axis=1).transpose(2, 0, 1)
    return [_in_rank_order(phase, order) for phase in (inside, between)]


def _between_then_inside(
    bytes_GG: np.ndarray, bytes_to_nodes_GN: np.ndarray, node_of_rank: np.ndarray, ranks_NK: np.ndarray
) -> list[np.ndarray]:
    nodes, size = ranks_NK.shape
    order = ranks_NK.reshape(-1)
    between = np.zeros((nodes, size, nodes, size))
    node, local = np.arange(nodes), np.arange(size)
    # For its own node a rank is its own relay: that is the diagonal.
    between[:, local, :, local] = bytes_to_nodes_GN[order].reshape(nodes, size, nodes).transpose(1, 0, 2)
    blocks = bytes_GG[np.ix_(order, order)].reshape(nodes, size, nodes, size)
    inside = np.zeros_like(blocks)
    inside[node, :, node, :] = blocks.sum(axis=0).transpose(1, 0, 2)
    return [_in_rank_order(phase, order) for phase in (between, inside)]


def _ranks_by_node(node_of_rank: np.ndarray) -> np.ndarray:
    """int [N, K]: the ranks of each node by local number."""
    sizes = np.bincount(node_of_rank)
    if (sizes != sizes[0]).any():
        worst = int(np.flatnonzero(sizes != sizes[0])[0])
        found = f"node 0 has {sizes[0]} ranks, node {worst} has {sizes[worst]}"
        raise ScaleMoEError("the 2dh exchange needs nodes with equal numbers of ranks", found=found, try_="the exchange flat or 1dh")
    return np.argsort(node_of_rank, kind="stable").reshape(sizes.size, -1)


def _in_rank_order(blocks_NKNK: np.ndarray, order: np.ndarray) -> np.ndarray:
    phase_GG = np.empty((order.size, order.size))
    phase_GG[np.ix_(order, order)] = blocks_NKNK.reshape(order.size, order.size)
    return phase_GG


def _without_diagonal(phase_GG: np.ndarray) -> np.ndarray:
    phase_GG = np.array(phase_GG, dtype=np.float64)
    np.fill_diagonal(phase_GG, 0.0)
    return phase_GG
