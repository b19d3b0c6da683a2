"""Constructions of placements with replicas, from loads alone: each in one pass, without search.

Suffixes: G ranks, E logical experts.
"""

from __future__ import annotations

import heapq

import numpy as np

from megatron_scalemoe.placement.problem import LayerProblem, Solution


def chained_replicas(
    load_E: np.ndarray, home_rank_E: np.ndarray, node_of_rank_G: np.ndarray, *, target: float, replicas: int, per_rank: int, own_node: bool
) -> Solution:
    """Replicas that bring every rank to `target` tokens, as few as possible, at most `replicas`, and `per_rank` on a rank.

    Walker's alias method (1974), with ranks for buckets: the most loaded rank passes of its heaviest expert what fills the least loaded one
    exactly; if it falls below the target by that, another fills it in turn. So G - 1 replicas, one per rank, balance exactly wherever one
    expert makes up a rank's excess; and each replica is a link of a chain along which later drift evens out.

    own_node: look first in the node of the expert's home, where replicas are cheaper.
    """
    ranks = node_of_rank_G.size
    solution = Solution.without_replicas(home_rank_E, ranks)
    hosts_EG, tokens_EG = solution.hosts, np.where(solution.hosts, load_E[:, None], 0.0)
    load_G, free_G = tokens_EG.sum(axis=0), np.full(ranks, per_rank)
    waiting_G = np.ones(ranks, dtype=bool)
    for _ in range(replicas):
        giver = expert = taker = -1
        while taker < 0:
            giver = int(np.where(waiting_G, load_G, -1.0).argmax())
            if not waiting_G[giver] or load_G[giver] <= target * (1 + 1e-9):
                return solution
            expert = int(tokens_EG[:, giver].argmax())
            taker = _taker(
                load_G, (free_G > 0) & ~hosts_EG[expert], target, own_node, node_of_rank_G == node_of_rank_G[home_rank_E[expert]]
            )
            waiting_G[giver] = taker >= 0
        moved = min(target - load_G[taker], tokens_EG[expert, giver])
        hosts_EG[expert, taker] = True
        free_G[taker] -= 1
        tokens_EG[expert, giver] -= moved
        tokens_EG[expert, taker] += moved
        load_G[giver] -= moved
        load_G[taker] += moved
    return solution


def _taker(load_G: np.ndarray, can_G: np.ndarray, target: float, own_node: bool, near_G: np.ndarray) -> int:
    """The least loaded rank below the target that can hold the replica, or -1."""
    can_G = can_G & (load_G < target * (1 - 1e-9))
    if own_node and (can_G & near_G).any():
        can_G = can_G & near_G
    return int(np.where(can_G, load_G, np.inf).argmin()) if can_G.any() else -1


def packed_replicas(load_E: np.ndarray, *, ranks: int, replicas: int, per_rank: int) -> Solution:
    """Each copy goes to the expert with the largest load per copy; then the copies, heaviest first, to the least loaded rank with room:
    EPLB's shape, meant for an even split. The last copy of an expert at the latest is its home, of which each rank takes E/G.
    """
    experts = load_E.size
    copies_E = copies_by_load(load_E, replicas, ranks)
    home_rank_E, hosts_EG, load_G = np.full(experts, -1), np.zeros((experts, ranks), dtype=bool), np.zeros(ranks)
    homes_free_G, replicas_free_G = np.full(ranks, experts // ranks), np.full(ranks, per_rank)
    left_E, heaviest_first = copies_E.copy(), np.argsort(-np.repeat(load_E / copies_E, copies_E), kind="stable")
    for expert in np.repeat(np.arange(experts), copies_E)[heaviest_first]:
        left_E[expert] -= 1
        homeless = home_rank_E[expert] < 0
        last_chance = homeless and left_E[expert] == 0
        replica_G = (replicas_free_G > 0) & ~hosts_EG[expert] & (not last_chance)
        # A replica may become the home where it is.
        home_G = (homes_free_G > 0) & homeless & (~hosts_EG[expert] | last_chance)
        if not (replica_G | home_G).any():
            continue  # every rank with room has this expert
        rank = int(np.where(replica_G | home_G, load_G, np.inf).argmin())
        if replica_G[rank]:
            replicas_free_G[rank] -= 1
        else:
            homes_free_G[rank] -= 1
            replicas_free_G[rank] += hosts_EG[expert, rank]
            home_rank_E[expert] = rank
        hosts_EG[expert, rank] = True
        load_G[rank] += load_E[expert] / copies_E[expert]
    return Solution(home_rank_E, hosts_EG)


def copies_by_load(load_E: np.ndarray, replicas: int, ranks: int) -> np.ndarray:
    """int64 [E]: copies of each expert: one each, then one more of whichever has the largest load a copy (at most one a rank)."""
    copies_E = np.ones(load_E.size, dtype=np.int64)
    heap = [(-load, expert) for expert, load in enumerate(load_E)]
    heapq.heapify(heap)
    if ranks == 1:
        return copies_E
    for _ in range(replicas):
        if not heap:
            break  # every expert is on every rank
        _, expert = heap[0]
        copies_E[expert] += 1
        if copies_E[expert] == ranks:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (-load_E[expert] / copies_E[expert], expert))
    return copies_E


def balanced_homes(load_E: np.ndarray, ranks: int) -> np.ndarray:
    """int64 [E]: the experts, heaviest first, each to the least loaded rank that has fewer than E/G."""
    home_rank_E = np.empty(load_E.size, dtype=np.int64)
    heap = [(0.0, 0, rank) for rank in range(ranks)]
    for expert in np.argsort(-load_E, kind="stable"):
        load, homes, rank = heapq.heappop(heap)
        home_rank_E[expert] = rank
        if homes + 1 < load_E.size // ranks:
            heapq.heappush(heap, (load + load_E[expert], homes + 1, rank))
    return home_rank_E


def eplb_shaped(problem: LayerProblem) -> Solution:
    """After the shape of DeepSeek's EPLB (github.com/deepseek-ai/EPLB): experts to nodes, copies of the hottest within each, to its ranks.
    Replicas are fewer than asked for, where no rank has room for a further copy.

    It looks at loads only and thinks of each expert's tokens as split evenly over its copies. It differs from EPLB where our plans are
    stricter: a rank never holds an expert twice, and each has E/G homes. Traces name no expert groups: every expert is its own group.

    Node by node where all nodes have as many ranks, and as many replicas each; otherwise the cluster counts as one node.
    """
    load_E, node_of_rank_G = problem.load, problem.ports.node_of_rank
    ranks_per_node = problem.ports.node_sizes
    nodes = problem.ports.num_nodes
    if np.ptp(ranks_per_node) or problem.replicas % nodes:
        nodes, node_of_rank_G = 1, np.zeros_like(node_of_rank_G)
    node_of_E = balanced_homes(load_E, nodes)
    home_rank_E = np.empty(load_E.size, dtype=np.int64)
    hosts_EG = np.zeros((load_E.size, problem.num_ranks), dtype=bool)
    for node in range(nodes):
        experts, ranks = np.flatnonzero(node_of_E == node), np.flatnonzero(node_of_rank_G == node)
        inside = packed_replicas(
            load_E[experts], ranks=ranks.size, replicas=problem.replicas // nodes, per_rank=problem.replica_slots_per_rank
        )
        home_rank_E[experts] = ranks[inside.home_rank]
        hosts_EG[np.ix_(experts, ranks)] = inside.hosts
    return Solution(home_rank_E, hosts_EG)
