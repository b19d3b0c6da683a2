"""Items to bins of fixed capacity with the largest total score: the transportation problem, exactly, in integers.

`linear_sum_assignment` with a column per place needs items x items numbers and seconds for 2048 items; there are few bins, so here the
graph has one vertex per bin. Prices first: every item takes its best bin at prices that bins raise while they are over-full and lower
otherwise (a few rounds; heuristic). Then successive shortest paths (Bellman-Ford) move one item after another along chains of bins from an
over-full bin to one with room; arc g -> h costs what the item of g loses that loses least by going to h. Items at their best price leave no
negative cycle, so each shortest path keeps the assignment optimal for its bins' counts (Ahuja, Magnanti, Orlin, Network Flows, 9.7). Any
prices give an optimum: good ones only save paths.

Integers throughout: the result does not depend on the machine. Suffixes: B items, K bins.
"""

from __future__ import annotations

import numpy as np

_FAR = np.int64(2**61)
_PRICE_ROUNDS = 100
# A price's step grows while the bin stays over-full (or under-full), and shrinks when that changes (Riedmiller's Rprop).
_FIRST_STEP, _GROW_PERCENT, _SHRINK_PERCENT = 128, 120, 60


def assign_to_bins(score_BK: np.ndarray, capacity_K: np.ndarray) -> np.ndarray:
    """int64 [B]: a bin for each item, capacity_K[k] items in bin k, so that the sum of the items' scores is the largest possible.

    score_BK: int64 [B, K]. capacity_K: int [K], with sum B.
    """
    items, bins = score_BK.shape
    assert score_BK.dtype == np.int64 and capacity_K.sum() == items and (capacity_K >= 0).all()
    assert int(np.abs(score_BK).max(initial=0)) * 4 * (bins + 1) < _FAR, "path lengths would overflow"
    bin_B = (score_BK - _prices(score_BK, capacity_K)).argmax(axis=1)
    excess_K = np.bincount(bin_B, minlength=bins) - capacity_K
    loss_KK, item_KK = np.full((bins, bins), _FAR), np.zeros((bins, bins), dtype=np.int64)
    for k in range(bins):
        _cheapest_moves(k, score_BK, bin_B, loss_KK, item_KK)
    while (excess_K > 0).any():
        path = _shortest_path(loss_KK, excess_K)
        movers = [item_KK[g, h] for g, h in zip(path, path[1:], strict=False)]
        bin_B[movers] = path[1:]
        excess_K[path[0]] -= 1
        excess_K[path[-1]] += 1
        for k in path:
            _cheapest_moves(k, score_BK, bin_B, loss_KK, item_KK)
    return bin_B


def _prices(score_BK: np.ndarray, capacity_K: np.ndarray) -> np.ndarray:
    """int64 [K]: prices at which few items want a bin that is full."""
    bins = capacity_K.size
    price_K = score_BK.sum(axis=0) // max(len(score_BK), 1)
    step_K = np.full(bins, np.abs(score_BK - price_K).max(initial=0) // _FIRST_STEP + 1)
    best_K, fewest, last_K = price_K, None, np.zeros(bins, dtype=np.int64)
    for _ in range(_PRICE_ROUNDS):
        excess_K = np.bincount((score_BK - price_K).argmax(axis=1), minlength=bins) - capacity_K
        unplaced = np.maximum(excess_K, 0).sum()
        if fewest is None or unplaced < fewest:
            best_K, fewest = price_K, unplaced
        if not unplaced:
            break
        sign_K = np.sign(excess_K)
        percent_K = np.select([sign_K * last_K > 0, sign_K * last_K < 0], [_GROW_PERCENT, _SHRINK_PERCENT], 100)
        step_K, last_K = np.clip(step_K * percent_K // 100, 1, _FAR // 2**10), sign_K
        price_K = price_K + sign_K * step_K
    return best_K


def _cheapest_moves(k: int, score_BK: np.ndarray, bin_B: np.ndarray, loss_KK: np.ndarray, item_KK: np.ndarray) -> None:
    """Fills row k: for each other bin the item of bin k that loses least by going there, and what it loses."""
    member_X = np.flatnonzero(bin_B == k)
    if not member_X.size:
        loss_KK[k] = _FAR
        return
    loss_XK = score_BK[member_X, k][:, None] - score_BK[member_X]
    least_K = loss_XK.argmin(axis=0)
    loss_KK[k], item_KK[k] = loss_XK[least_K, np.arange(loss_KK.shape[0])], member_X[least_K]


def _shortest_path(loss_KK: np.ndarray, excess_K: np.ndarray) -> list[int]:
    """Bins along the cheapest chain of moves from an over-full bin to one with room."""
    distance_K, parent_K = np.where(excess_K > 0, 0, _FAR), np.full(excess_K.size, -1)
    while True:
        through_KK = np.minimum(distance_K[:, None] + loss_KK, _FAR)
        via_K = through_KK.argmin(axis=0)
        nearer_K = through_KK.min(axis=0)
        closer_K = nearer_K < distance_K
        if not closer_K.any():
            break
        parent_K[closer_K] = via_K[closer_K]
        distance_K = np.where(closer_K, nearer_K, distance_K)
    room_X = np.flatnonzero(excess_K < 0)
    path = [int(room_X[distance_K[room_X].argmin()])]
    while parent_K[path[-1]] >= 0:
        path.append(int(parent_K[path[-1]]))
    return path[::-1]
