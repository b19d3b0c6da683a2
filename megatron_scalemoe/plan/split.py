"""Per-step replica split: which copy of its expert each token goes to, from exact counts.

Only experts with several copies leave a choice. Two steps, both on integers:

1. How many tokens each copy gets. Starting from the local-first assignment, tokens leave ranks above a threshold T, through experts
   that have a copy elsewhere, for ranks below it: a small maximum flow. If some cannot leave, the minimum cut is a set R of ranks that
   can pass nothing more on, so that T must rise by (tokens that stay) / |R|: the discrete Newton method (Radzik 1998) on the bottleneck.
   It ends, after 1 to 4 flows as measured, with the smallest integer T that is possible, exactly. Dinic's algorithm takes shortest ways
   first, so few tokens move.
2. Which source fills which copy: its own node's before another's. What a node cannot supply itself comes from the others, and is spread
   over the node's copies in proportion; of the rest each copy takes its own rank's tokens first. (With all of a rank's own tokens first,
   tokens from other nodes would crowd on few ranks, and all would wait for their NICs.)

Flows, and not sweeps of water-filling expert by expert, because one takes 0.13 ms in scipy for 64 ranks, and is exact also where replicas
chain many ranks together; sweeps carry load along a chain only step by step.

Suffixes: B cases, G ranks, N nodes, E experts, X experts with several copies, C copies of those, P slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.plan.placement_plan import EMPTY

# Capacities of scipy's maximum flow are int32, also the sum of an edge's two directions. A batch of float loads is scaled to less, in all.
_LARGEST_TOTAL = 2**30 - 1
_FLOAT_SCALE = 2**29


def split_tokens(
    counts_GE: np.ndarray, slots_P: np.ndarray, num_ranks: int, node_of_rank_G: np.ndarray, *, even: bool = False
) -> np.ndarray:
    """int64 [G, P]: how many of each source rank's tokens go to each slot. Rows hold exactly the tokens of `counts_GE`.

    counts_GE: int [G, E], tokens of rank g that chose expert e. slots_P: int [P], one layer's `physical_to_logical`; rank r holds the slots
    r*P/G up to (r+1)*P/G, no expert twice. node_of_rank_G: int [G].
    even: each expert evenly over its copies (EPLB's split); otherwise the largest rank load is the smallest possible in whole tokens.

    Integers only, no randomness: every rank computes the same. Raises `ScaleMoEError` for counts that do not fit, or tokens without a slot.
    """
    counts_GE = _checked(counts_GE, slots_P, num_ranks)
    out_GP = np.zeros((num_ranks, slots_P.size), dtype=np.int64)
    used_P = slots_P != EMPTY
    copies_E = np.bincount(slots_P[used_P], minlength=counts_GE.shape[1])
    if (copies_E == 0).any() and counts_GE[:, copies_E == 0].any():
        lost = int(np.flatnonzero((copies_E == 0) & counts_GE.any(axis=0))[0])
        raise ScaleMoEError("every expert that tokens choose must have a slot", found=f"no slot for expert {lost}")
    rank_P = np.arange(slots_P.size) // (slots_P.size // num_ranks)
    single = np.flatnonzero(used_P)[copies_E[slots_P[used_P]] == 1]
    out_GP[:, single] = counts_GE[:, slots_P[single]]
    several_E = np.flatnonzero(copies_E > 1)
    if not several_E.size:
        return out_GP
    slot_C = np.flatnonzero(used_P & (copies_E[slots_P] > 1))
    slot_C = slot_C[np.lexsort((np.asarray(node_of_rank_G)[rank_P[slot_C]], slots_P[slot_C]))]
    expert_C, rank_C = np.searchsorted(several_E, slots_P[slot_C]), rank_P[slot_C]
    counts_GX = counts_GE[:, several_E]
    if even:
        tokens_C = _evenly(counts_GX.sum(axis=0), expert_C)
    else:
        fixed_G = np.bincount(rank_P[single], out_GP[:, single].sum(axis=0), num_ranks).astype(np.int64)
        start_C = _local_first(counts_GX, expert_C, rank_C, np.asarray(node_of_rank_G))
        tokens_C = _balance(start_C[None], fixed_G[None], expert_C, rank_C)[0][0]
    out_GP[:, slot_C] = _fill(counts_GX, tokens_C, expert_C, rank_C, np.asarray(node_of_rank_G))
    return out_GP


def balanced_shares(load_E: np.ndarray, hosts_EG: np.ndarray) -> np.ndarray:
    """float64 [E, G]: fractions of each expert's tokens for each rank that make the largest rank load the smallest possible.

    load_E: float [E], 0 or more. hosts_EG: bool [E, G], at least one rank for each expert. Rows sum to 1; experts without load are even.
    Exact to a billionth of the whole load; the experts' shares stay near even where the optimum leaves a choice.
    """
    share_EG = even_shares(hosts_EG)
    several_E = np.flatnonzero((hosts_EG.sum(axis=1) > 1) & (load_E > 0))
    if several_E.size:
        tokens_BC, _, _, expert_C, rank_C = _balance_floats(load_E[None], hosts_EG, several_E)
        total_C = np.bincount(expert_C, tokens_BC[0])[expert_C]
        some = total_C > 0
        share_EG[several_E[expert_C[some]], rank_C[some]] = tokens_BC[0][some] / total_C[some]
    return share_EG


def even_shares(hosts_EG: np.ndarray) -> np.ndarray:
    """float64 [E, G]: each expert evenly over the ranks that hold it."""
    return hosts_EG / hosts_EG.sum(axis=1, keepdims=True)


def balanced_max_load(loads_BE: np.ndarray, hosts_EG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [B], bool [B, G]: the largest rank load under the best split, for B loads at once, and the ranks that cause it.

    loads_BE: float [B, E]. The ranks R that cause it are a bottleneck: load that can go nowhere else / |R| = the largest load.
    """
    _, largest_B, tight_BG, _, _ = _balance_floats(loads_BE, hosts_EG, np.flatnonzero(hosts_EG.sum(axis=1) > 1))
    return largest_B, tight_BG


def _checked(counts_GE: np.ndarray, slots_P: np.ndarray, num_ranks: int) -> np.ndarray:
    if counts_GE.ndim != 2 or counts_GE.shape[0] != num_ranks or counts_GE.dtype.kind not in "iu":
        problem = f"counts must be integers [ranks = {num_ranks}, experts]"
        raise ScaleMoEError(problem, found=f"{counts_GE.dtype} {counts_GE.shape}")
    if slots_P.ndim != 1 or not slots_P.size or slots_P.size % num_ranks or slots_P.max() >= counts_GE.shape[1]:
        problem = f"slots must be a multiple of the {num_ranks} ranks, and hold experts below {counts_GE.shape[1]}"
        raise ScaleMoEError(problem, found=f"shape {slots_P.shape}, expert {slots_P.max(initial=EMPTY)}")
    counts_GE = counts_GE.astype(np.int64)
    if counts_GE.min(initial=0) < 0 or counts_GE.sum() > _LARGEST_TOTAL:
        raise ScaleMoEError(
            "counts must be 0 or more, and sum to less than 2^30", found=f"smallest {counts_GE.min()}, sum {counts_GE.sum()}"
        )
    return counts_GE


def _evenly(total_BK: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """int64 [..., C]: total_BK[..., k] spread over the members of group k, the first ones getting one more where it does not divide."""
    size_K = np.bincount(group_C, minlength=total_BK.shape[-1])
    order = np.argsort(group_C, kind="stable")
    position_C = np.empty_like(group_C)
    position_C[order] = np.arange(group_C.size) - (np.cumsum(size_K) - size_K)[group_C[order]]
    each_BK, more_BK = np.divmod(total_BK, np.maximum(size_K, 1))
    return each_BK[..., group_C] + (position_C < more_BK[..., group_C])


def _local_first(counts_GX: np.ndarray, expert_C: np.ndarray, rank_C: np.ndarray, node_G: np.ndarray) -> np.ndarray:
    """int64 [C]: tokens of each copy when sources take the copy of their rank, or else all of their node, or else all, evenly."""
    experts, nodes = counts_GX.shape[1], int(node_G.max()) + 1
    own_C = counts_GX[rank_C, expert_C]
    group_C = node_G[rank_C] * experts + expert_C
    others_NX = np.zeros((nodes, experts), dtype=np.int64)
    np.add.at(others_NX, node_G, counts_GX)
    np.subtract.at(others_NX.reshape(-1), group_C, own_C)
    hosted_NX = np.bincount(group_C, minlength=nodes * experts).reshape(nodes, experts) > 0
    rest_X = np.where(hosted_NX, 0, others_NX).sum(axis=0)
    return own_C + _evenly(others_NX.reshape(-1), group_C) + _evenly(rest_X, expert_C)


def _fill(counts_GX: np.ndarray, tokens_C: np.ndarray, expert_C: np.ndarray, rank_C: np.ndarray, node_G: np.ndarray) -> np.ndarray:
    """int64 [G, C]: who fills which copy: own node before others; of what the own node may fill, own rank first."""
    several_nodes = bool(node_G.any())
    room_C = tokens_C - _from_other_nodes(counts_GX, tokens_C, expert_C, rank_C, node_G) if several_nodes else tokens_C
    out_GC = np.zeros((counts_GX.shape[0], tokens_C.size), dtype=np.int64)
    own_C = np.minimum(counts_GX[rank_C, expert_C], room_C)
    out_GC[rank_C, np.arange(rank_C.size)] = own_C
    left_GX = counts_GX.copy()
    left_GX[rank_C, expert_C] -= own_C
    out_GC += _fill_in_order(left_GX, room_C - own_C, expert_C, node_G, node_G[rank_C])
    if several_nodes:
        first_C = np.flatnonzero(np.diff(expert_C, prepend=-1))  # copies are sorted by expert
        left_GX = counts_GX - np.add.reduceat(out_GC, first_C, axis=1)
        out_GC += _fill_in_order(left_GX, tokens_C - room_C, expert_C, np.zeros_like(node_G), np.zeros_like(rank_C))
    return out_GC


def _from_other_nodes(
    counts_GX: np.ndarray, tokens_C: np.ndarray, expert_C: np.ndarray, rank_C: np.ndarray, node_G: np.ndarray
) -> np.ndarray:
    """int64 [C]: of each copy's tokens, those that its node cannot supply: spread over the node's copies in proportion to their tokens, so
    that no rank's scale-out port takes more than its part."""
    nodes, experts = int(node_G.max()) + 1, counts_GX.shape[1]
    group_C = expert_C * nodes + node_G[rank_C]
    supply_NX = np.zeros((nodes, experts), dtype=np.int64)
    np.add.at(supply_NX, node_G, counts_GX)
    end_C = _cumulative_in_runs(tokens_C, group_C)
    wanted_K = np.bincount(group_C, tokens_C, nodes * experts).astype(np.int64)
    missing_K = np.maximum(wanted_K - supply_NX.T.reshape(-1), 0)
    part_K, whole_K = missing_K[group_C], np.maximum(wanted_K, 1)[group_C]
    return end_C * part_K // whole_K - (end_C - tokens_C) * part_K // whole_K


def _fill_in_order(left_GX: np.ndarray, room_C: np.ndarray, expert_C: np.ndarray, group_G: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """int64 [G, C]: lays the sources' tokens of an expert, and its copies' room, end to end within each group: what lies on what.

    Copies are sorted by expert, then by group.
    """
    order_G = np.argsort(group_G, kind="stable")
    end_GX = np.empty_like(left_GX)
    end_GX[order_G] = _cumulative_in_runs(left_GX[order_G], group_G[order_G])
    room_end_C = _cumulative_in_runs(room_C, expert_C * (group_C.max() + 1) + group_C)
    start_GC = np.maximum((end_GX - left_GX)[:, expert_C], room_end_C - room_C)
    overlap_GC = np.minimum(end_GX[:, expert_C], room_end_C) - start_GC
    return np.where(group_G[:, None] == group_C, np.maximum(overlap_GC, 0), 0)


def _cumulative_in_runs(values: np.ndarray, run: np.ndarray) -> np.ndarray:
    """Running sums along the first axis that start again wherever `run` changes."""
    total = np.cumsum(values, axis=0)
    first = np.flatnonzero(np.diff(run, prepend=run[0] - 1))
    before = total[first] - values[first]
    return total - np.repeat(before, np.diff(first, append=run.size), axis=0)


def _balance_floats(loads_BE: np.ndarray, hosts_EG: np.ndarray, several_E: np.ndarray) -> tuple[np.ndarray, ...]:
    """`_balance` of float loads from an even start: float tokens [B, C], largest load [B], tight ranks [B, G]; and expert_C, rank_C."""
    assert np.isfinite(loads_BE).all(), "loads must be finite"
    assert (loads_BE >= 0).all(), "loads must be 0 or more"
    total_B = loads_BE.sum(axis=1)
    total_B = np.where(total_B > 0, total_B, 1.0)
    units_BE = np.rint(loads_BE * (_FLOAT_SCALE // len(loads_BE) / total_B)[:, None]).astype(np.int64)
    expert_C, rank_C = np.nonzero(hosts_EG[several_E])
    single_E = hosts_EG.sum(axis=1) == 1
    fixed_BG = (units_BE[:, single_E] @ hosts_EG[single_E].astype(np.float64)).astype(np.int64)
    start_BC = _evenly(units_BE[:, several_E], expert_C)
    tokens_BC, largest_B, tight_BG = _balance(start_BC, fixed_BG, expert_C, rank_C)
    back_B = total_B / (_FLOAT_SCALE // len(loads_BE))
    return tokens_BC * back_B[:, None], largest_B * back_B, tight_BG, expert_C, rank_C


def _balance(
    start_BC: np.ndarray, fixed_BG: np.ndarray, expert_C: np.ndarray, rank_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [B, C] tokens of each copy, int64 [B] the smallest possible largest load, bool [B, G] the ranks that cause it.

    start_BC: where the tokens are at first. fixed_BG: tokens that cannot move.
    """
    ranks = fixed_BG.shape[1]
    load_BG = fixed_BG.copy()
    np.add.at(load_BG, (slice(None), rank_C), start_BC)
    threshold_B, tight_BG = _first_bound(load_BG, start_BC, fixed_BG, expert_C, rank_C)
    tokens_BC = start_BC.copy()
    active = np.flatnonzero((load_BG > threshold_B[:, None]).any(axis=1))
    network = None
    while active.size:
        if network is None or len(network.rank_BG) != active.size:
            network = _network(active.size, ranks, expert_C, rank_C)
        excess_BG = load_BG[active] - threshold_B[active, None]
        moved_BC, stuck_B, cut_BG = _flow(network, excess_BG, start_BC[active])
        tokens_BC[active] = start_BC[active] - moved_BC
        active, stuck_B, cut_BG = active[stuck_B > 0], stuck_B[stuck_B > 0], cut_BG[stuck_B > 0]
        threshold_B[active] += -(-stuck_B // cut_BG.sum(axis=1))
        tight_BG[active] = cut_BG
    return tokens_BC, threshold_B, tight_BG


def _first_bound(
    load_BG: np.ndarray, start_BC: np.ndarray, fixed_BG: np.ndarray, expert_C: np.ndarray, rank_C: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B], bool [B, G]: the best lower bound on the largest load, and its ranks: all ranks, one rank, or the hosts of one expert."""
    cases, ranks = load_BG.shape
    hosts_XG = np.zeros((int(expert_C.max(initial=-1)) + 1, ranks), dtype=bool)
    hosts_XG[expert_C, rank_C] = True
    inside_BX = np.zeros((cases, len(hosts_XG)), dtype=np.int64)
    np.add.at(inside_BX, (slice(None), expert_C), start_BC + fixed_BG[:, rank_C])
    bounds = (-(-load_BG.sum(axis=1, keepdims=True) // ranks), fixed_BG, -(-inside_BX // hosts_XG.sum(axis=1)))
    bound_BK = np.concatenate(bounds, axis=1)
    best_B = bound_BK.argmax(axis=1)
    ranks_KG = np.concatenate([np.ones((1, ranks), dtype=bool), np.eye(ranks, dtype=bool), hosts_XG])
    return bound_BK[np.arange(cases), best_B], ranks_KG[best_B]


@dataclasses.dataclass(frozen=True, eq=False)
class _Network:
    """The flow network of several cases side by side: source -> ranks <-> experts, ranks -> sink. Capacities come with each flow.

    Vertices: 0 the source, 1 the sink, then the ranks (rank_BG) and the experts of each case. Edges by kind: source to rank and back,
    rank to sink and back, each [B, G], copy to expert and back, each [B, C]. order: these edges in CSR order; place: the inverse.
    """

    rank_BG: np.ndarray
    order: np.ndarray
    place: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.indptr.size - 1, self.indptr.size - 1


def _network(cases: int, ranks: int, expert_C: np.ndarray, rank_C: np.ndarray) -> _Network:
    first_B1 = 2 + np.arange(cases)[:, None] * (ranks + int(expert_C.max()) + 1)
    rank_BG, at_BC, expert_BC = first_B1 + np.arange(ranks), first_B1 + rank_C, first_B1 + ranks + expert_C
    source_BG, sink_BG = np.zeros_like(rank_BG), np.ones_like(rank_BG)
    tails = (source_BG, rank_BG, rank_BG, sink_BG, at_BC, expert_BC)
    heads = (rank_BG, source_BG, sink_BG, rank_BG, expert_BC, at_BC)
    tail, head = (np.concatenate([part.reshape(-1) for part in parts]) for parts in (tails, heads))
    size = int(expert_BC.max()) + 1
    order = np.argsort(tail * size + head)
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    indptr = np.searchsorted(tail[order], np.arange(size + 1))
    return _Network(rank_BG, order, place, head[order].astype(np.int32), indptr.astype(np.int32))


def _flow(network: _Network, excess_BG: np.ndarray, start_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [B, C] tokens that leave each copy (negative: arrive), int64 [B] excess that stays, bool [B, G] ranks of the minimum cut."""
    over_BG, back_BG = np.maximum(excess_BG, 0), np.zeros_like(excess_BG)
    capacities = (over_BG, back_BG, np.maximum(-excess_BG, 0), back_BG, start_BC, np.full_like(start_BC, _LARGEST_TOTAL))
    capacity = np.concatenate([part.reshape(-1) for part in capacities])[network.order].astype(np.int32)
    graph = csr_array((capacity, network.indices, network.indptr), shape=network.shape)
    flow = maximum_flow(graph, 0, 1).flow.data  # of the same edges, in the same order: each has its opposite
    by_kind = flow[network.place].astype(np.int64)
    moved_BC = by_kind[4 * over_BG.size :][: start_BC.size].reshape(start_BC.shape)
    stuck_B = over_BG.sum(axis=1) - by_kind[: over_BG.size].reshape(over_BG.shape).sum(axis=1)
    if not stuck_B.any():
        return moved_BC, stuck_B, np.zeros_like(over_BG, dtype=bool)
    open_edges = np.flatnonzero(flow < capacity)
    indptr = np.searchsorted(open_edges, network.indptr)
    residual = csr_array((np.ones(open_edges.size), network.indices[open_edges], indptr), shape=network.shape)
    reached = np.zeros(network.shape[0], dtype=bool)
    reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
    return moved_BC, stuck_B, reached[network.rank_BG]
