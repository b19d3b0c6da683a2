"""From one plan to the next: which experts move, in which order, how many bytes and how long.

Only homes move: parameters and optimizer state go from the old home rank to the new one. Replicas move nothing: they are sent anew by their
home in every optimizer step, whatever the plan. Suffixes: L layers, G ranks, E logical experts, P slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import maximum_bipartite_matching

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.plan.fit import check_fit
from megatron_scalemoe.plan.placement_plan import EMPTY, PlacementPlan
from megatron_scalemoe.topology.ports import Ports

# Beside the parameter itself (2 bytes in bf16): its fp32 master copy and Adam's two fp32 moments.
OPTIMIZER_BYTES_PER_PARAMETER = 4 + 4 + 4


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """int64 arrays, one entry per home that moves and per new replica, by layer, homes first: layer, expert, source (the old home rank;
    for a replica the new home rank, which will send it its parameters), destination; and bool is_home: False for replicas."""

    layer: np.ndarray
    expert: np.ndarray
    source: np.ndarray
    destination: np.ndarray
    is_home: np.ndarray

    @property
    def num_homes(self) -> int:
        return int(self.is_home.sum())


def align_plan(old: PlacementPlan, new: PlacementPlan, interchangeable_G: np.ndarray | None = None) -> PlacementPlan:
    """`new`, rearranged so that as little as possible moves from `old`.

    interchangeable_G: int [G], ranks of equal number may swap all that they hold, see `interchangeable_ranks`; which of them takes what is
    a linear assignment per layer that keeps most homes (then most replicas) in place. None: no rank takes another's experts.
    Within a rank experts keep their slots where they can. Raises `ScaleMoEError` if the plans are for different layers, ranks or experts.
    """
    check_fit({"the old plan": old, "the new plan": new})
    groups = [] if interchangeable_G is None else [np.flatnonzero(interchangeable_G == i) for i in np.unique(interchangeable_G)]
    slots_LP = []
    for layer in range(new.num_layers):
        new_GS = new.physical_to_logical[layer].reshape(new.num_ranks, -1).copy()
        old_GS = old.physical_to_logical[layer].reshape(old.num_ranks, -1)
        for ranks in groups:
            new_GS[ranks] = new_GS[ranks[_best_takers(old_GS[ranks], new_GS[ranks], new.homes_per_rank, new.num_logical_experts)]]
        homes = new.homes_per_rank
        parts = [_keep_slots(old_GS[:, :homes], new_GS[:, :homes]), _keep_slots(old_GS[:, homes:], new_GS[:, homes:])]
        slots_LP.append(np.concatenate(parts, axis=1).reshape(-1))
    return PlacementPlan(np.stack(slots_LP), new.num_ranks, new.num_logical_experts, new.provenance)


def interchangeable_ranks(ports: Ports) -> np.ndarray:
    """int64 [G]: a number for each rank, equal for ranks of one node with equal ports. Their placements cost the same up to what each rank
    draws from itself, which differs only if sources differ in their taste."""
    return np.unique(ports.rank_features, axis=0, return_inverse=True)[1].reshape(-1)


def moves(old: PlacementPlan, new: PlacementPlan) -> Moves:
    """What changes when `new` follows `old`. Raises `ScaleMoEError` if the plans are for different layers, ranks or experts."""
    check_fit({"the old plan": old, "the new plan": new})
    old_rank_LE, new_rank_LE = old.home_rank, new.home_rank
    parts = []
    for layer in range(new.num_layers):
        moved = np.flatnonzero(old_rank_LE[layer] != new_rank_LE[layer])
        parts.append((layer, moved, old_rank_LE[layer, moved], new_rank_LE[layer, moved], True))
        expert, rank = np.nonzero(_replicas(new, layer) & ~_replicas(old, layer))
        parts.append((layer, expert, new_rank_LE[layer, expert], rank, False))
    layers = np.concatenate([np.full(part[1].size, part[0]) for part in parts])
    homes = np.concatenate([np.full(part[1].size, part[4]) for part in parts])
    expert, source, destination = (np.concatenate([part[i] for part in parts]).astype(np.int64) for i in (1, 2, 3))
    return Moves(layers, expert, source, destination, homes)


def replicas_removed(old: PlacementPlan, new: PlacementPlan) -> np.ndarray:
    """int64 [L]: replicas of `old` that `new` no longer has (one that becomes the home counts)."""
    check_fit({"the old plan": old, "the new plan": new})
    return np.array([np.count_nonzero(_replicas(old, layer) & ~_replicas(new, layer)) for layer in range(new.num_layers)])


def rounds(moved: Moves, num_ranks: int) -> list[np.ndarray]:
    """The homes among `moved` in order: each round an int64 array of positions in it.

    In a round every rank sends one expert and receives one, or does neither, and all moves of a round are of one layer. So a rank needs one
    spare expert of memory: it receives into it, and drops what it sent once the round is over. A layer takes as many rounds as the most
    moves that one rank has in it: homes per rank are equal before and after, so the moves, with idle ranks sending to themselves, are a
    regular bipartite multigraph, which is a union of perfect matchings (König 1916).
    """
    result = []
    for layer in np.unique(moved.layer[moved.is_home]):
        chosen = np.flatnonzero(moved.is_home & (moved.layer == layer))
        waiting: dict[tuple[int, int], list[int]] = {}
        for i in chosen[::-1]:
            waiting.setdefault((int(moved.source[i]), int(moved.destination[i])), []).append(int(i))
        sent_G = np.bincount(moved.source[chosen], minlength=num_ranks)
        assert np.array_equal(sent_G, np.bincount(moved.destination[chosen], minlength=num_ranks)), "homes per rank must stay equal"
        left_GG = np.zeros((num_ranks, num_ranks), dtype=np.int64)
        np.add.at(left_GG, (moved.source[chosen], moved.destination[chosen]), 1)
        left_GG[np.arange(num_ranks), np.arange(num_ranks)] = sent_G.max() - sent_G
        for _ in range(sent_G.max()):
            destination_G = maximum_bipartite_matching(sparse.csr_array(left_GG > 0), perm_type="column")
            left_GG[np.arange(num_ranks), destination_G] -= 1
            pairs = [(rank, int(to)) for rank, to in enumerate(destination_G) if rank != to]
            result.append(np.array([waiting[pair].pop() for pair in pairs], dtype=np.int64))
    return result


def state_bytes(cost: CostModel) -> int:
    """Bytes of one expert that moves: parameter, fp32 master copy, Adam's two moments; 14 bytes per bf16 parameter."""
    return cost.expert_parameters * (cost.bytes_per_value + OPTIMIZER_BYTES_PER_PARAMETER)


def migration_bytes(moved: Moves, cost: CostModel) -> int:
    """Bytes over the network for all homes that move."""
    return moved.num_homes * state_bytes(cost)


def migration_us(moved: Moves, ports: Ports, expert_bytes: int) -> float:
    """Time of all rounds, one after the other: each takes its busiest port, and the latency of its farthest move.

    expert_bytes: of one expert with its optimizer state, see `state_bytes`.
    """
    total_us = 0.0
    for chosen in rounds(moved, ports.num_ranks):
        bytes_GG = np.zeros((ports.num_ranks, ports.num_ranks))
        bytes_GG[moved.source[chosen], moved.destination[chosen]] = expert_bytes
        total_us += float(ports.busy_us(bytes_GG).max()) + ports.latency_us(bytes_GG)
    return total_us


def _replicas(plan: PlacementPlan, layer: int) -> np.ndarray:
    replicas_EG = plan.hosts(layer)
    replicas_EG[np.arange(plan.num_logical_experts), plan.home_rank[layer]] = False
    return replicas_EG


def _best_takers(old_RS: np.ndarray, new_RS: np.ndarray, homes: int, experts: int) -> np.ndarray:
    """int64 [R]: which row of `new_RS` each rank takes; ties go to the rank that had it."""
    together = [_membership(rows[:, part], experts) for part in (slice(None, homes), slice(homes, None)) for rows in (old_RS, new_RS)]
    kept_homes, kept_replicas = together[0] @ together[1].T, together[2] @ together[3].T
    ranks = old_RS.shape[0]
    # A home is worth more than all replicas of the group, and a replica more than all ties.
    worth = (kept_homes * (new_RS.size + 1) + kept_replicas) * (ranks + 1) + np.eye(ranks, dtype=np.int64)
    return linear_sum_assignment(worth, maximize=True)[1]


def _membership(rows_RS: np.ndarray, experts: int) -> np.ndarray:
    """int64 [R, E]: 1 where the row holds the expert."""
    member = np.zeros((rows_RS.shape[0], experts), dtype=np.int64)
    rank, slot = np.nonzero(rows_RS != EMPTY)
    member[rank, rows_RS[rank, slot]] = 1
    return member


def _keep_slots(old_GS: np.ndarray, new_GS: np.ndarray) -> np.ndarray:
    """int32: each row of `new_GS` with experts in the slots that they have in `old_GS`, the others in the free slots in their order."""
    result_GS = np.full_like(new_GS, EMPTY)
    shared = min(old_GS.shape[1], new_GS.shape[1])
    for old_S, new_S, result_S in zip(old_GS, new_GS, result_GS, strict=True):
        stays_S = (old_S[:shared] != EMPTY) & np.isin(old_S[:shared], new_S)
        result_S[:shared][stays_S] = old_S[:shared][stays_S]
        arriving = new_S[(new_S != EMPTY) & ~np.isin(new_S, result_S)]
        result_S[np.flatnonzero(result_S == EMPTY)[: arriving.size]] = arriving
    return result_GS
