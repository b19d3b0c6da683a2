"""Cost of swapping the homes of two experts, for many candidate swaps at once, without evaluating whole placements.

A swap changes what two ranks receive: two columns of the rank x rank traffic. In-ports and compute of every candidate come from sums
kept per rank; the out-ports of all ranks are worked out only for candidates that the in-ports leave in the race.

Search objective: the cost of `objective.placement_cost` less its latencies (hardly any swap changes them), plus `SLOPE` times the mean
squares of the ranks' and of the nodes' times, each over the mean of the contiguous placement, so in us. The maximum alone leaves
plateaus: most swaps do not touch the busiest port, and the squares tell which of them are on the way.

Suffixes: K candidates, G ranks, N nodes, E logical experts, D directions (see `port_model`).
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.placement.solvers.port_model import PortModel

SLOPE = 0.02
# Candidates whose out-ports are worked out together: bounds the memory, and the best are usually among the first.
_CHUNK = 64


class SwapTable:
    """One placement of homes, kept so that its swaps are cheap to judge. Change it by `reset` and `swap` only.

    home_rank_E: int64 [E]. total_us: its cost, without latencies. objective_us: with the slope.
    """

    def __init__(self, model: PortModel, home_rank_E: np.ndarray):
        self.model = model
        experts, ranks = model.counts_EG.shape
        self._scale = np.ones(2)
        self.reset(np.repeat(np.arange(ranks), experts // ranks))
        means = np.array([self._rank_us_G.sum(), self._node_us_N.sum()])
        self._scale = SLOPE / np.maximum(means, 1e-9)
        self.reset(home_rank_E)

    def reset(self, home_rank_E: np.ndarray) -> None:
        """Starts over from another placement. home_rank_E: int [E], each rank E/G times."""
        model = self.model
        experts, ranks = model.counts_EG.shape
        self.home_rank_E = np.array(home_rank_E, dtype=np.int64)
        placed_EG = (self.home_rank_E[:, None] == np.arange(ranks)).astype(np.float64)
        drawn_3E = model.draw_3EG[:, np.arange(experts), self.home_rank_E]
        self._sums_3G = np.stack([np.bincount(self.home_rank_E, drawn_E, ranks) for drawn_E in drawn_3E])
        self._selections_GG = placed_EG.T @ model.counts_EG  # [destination, source]
        if model.pairs_EE is None:
            self._together_G = model.log_missed_E @ placed_EG
        else:
            self._with_rank_EG = model.pairs_EE @ placed_EG
            self._together_G = 0.5 * (self._with_rank_EG * placed_EG).sum(axis=0)
        self._factor_G = model.factor(self._sums_3G[0], self._together_G)
        self._rows_GG = self._selections_GG * self._factor_G[:, None]
        to_node_NG = model.in_node_GN.T @ self._rows_GG
        own_node_G = to_node_NG[model.node_of_rank_G, np.arange(ranks)]
        self._sent_near_G = own_node_G - self._rows_GG.diagonal()
        self._sent_far_G = to_node_NG.sum(axis=0) - own_node_G
        self._refresh()

    def swap(self, e: int, f: int) -> None:
        """Exchanges the homes of experts e and f, which live on different ranks."""
        model, a, b = self.model, int(self.home_rank_E[e]), int(self.home_rank_E[f])
        sums_32, together_2 = self._after(np.array([e, f]), np.array([f, e]))
        for rank, gone, come in ((a, e, f), (b, f, e)):
            self._selections_GG[rank] += model.counts_EG[come] - model.counts_EG[gone]
            if model.pairs_EE is not None:
                self._with_rank_EG[:, rank] += model.pairs_EE[come] - model.pairs_EE[gone]
        self._sums_3G[:, [a, b]], self._together_G[[a, b]] = sums_32, together_2
        self._factor_G[[a, b]] = model.factor(sums_32[0], together_2)
        self.home_rank_E[e], self.home_rank_E[f] = b, a
        for rank in (a, b):
            rows_G = self._selections_GG[rank] * self._factor_G[rank]
            change_G = rows_G - self._rows_GG[rank]
            change_G[rank] = 0.0
            near = model.node_of_rank_G == model.node_of_rank_G[rank]
            self._sent_near_G += np.where(near, change_G, 0.0)
            self._sent_far_G += np.where(near, 0.0, change_G)
            self._rows_GG[rank] = rows_G
        self._refresh()

    def _refresh(self) -> None:
        """Times and costs of the placement itself."""
        model, ranks = self.model, np.arange(self._factor_G.size)
        self._receive_DG = model.receive_us(ranks, self._sums_3G, self._factor_G)
        self._rank_us_G = self._rank_us(self._sums_3G, self._receive_DG)
        self._node_in_N = (self._sums_3G[2] * self._factor_G) @ model.in_node_GN
        node_in_DN = self._node_in_N * model.node_in_DN
        self._node_us_N = node_in_DN.sum(axis=0)
        send_D1 = self._send_us(self._sent_near_G[None], self._sent_far_G[None])
        exchange_D1 = np.maximum(send_D1, np.maximum(self._receive_DG.max(axis=1), node_in_DN.max(axis=1))[:, None])
        self.total_us = float(model.layer_us(exchange_D1, self._sums_3G[0].max())[0])
        self._squares = np.array([(self._rank_us_G**2).sum(), (self._node_us_N**2).sum()])
        self.objective_us = self.total_us + float(self._scale @ self._squares)

    def busiest_ranks(self) -> np.ndarray:
        """int64: the ranks whose experts, or whose tokens, set the cost: of the largest compute and of the busiest port both ways."""
        model = self.model
        found = [np.array([self._sums_3G[0].argmax()])]
        send_DG = np.maximum(self._sent_near_G * model.near_out_DG, self._sent_far_G * model.far_out_DG)
        node_in_DN, node_out_DN = self._node_in_N * model.node_in_DN, (self._sent_far_G @ model.in_node_GN) * model.node_out_DN
        for d in range(send_DG.shape[0]):
            peaks = [self._receive_DG[d].max(), send_DG[d].max(), node_in_DN[d].max(), node_out_DN[d].max()]
            busiest = int(np.argmax(peaks))
            by_rank = (self._receive_DG, send_DG, node_in_DN, node_out_DN)[busiest][d]
            which = model.node_of_rank_G == by_rank.argmax() if busiest >= 2 else np.arange(by_rank.size) == by_rank.argmax()
            found.append(np.flatnonzero(which))
        return np.unique(np.concatenate(found))

    def objectives(self, e_K: np.ndarray, f_K: np.ndarray, below: float = np.inf) -> np.ndarray:
        """float64 [K]: `objective_us` after swapping e_K[k] with f_K[k] (int, on different ranks); exact if under `below`, and then
        at least the smallest ones; inf or too small never: others are inf.
        """
        bound_K, changed = self._bounds(e_K, f_K)
        result_K = np.full(e_K.size, np.inf)
        order = np.flatnonzero(bound_K < below)
        order = order[np.argsort(bound_K[order], kind="stable")]
        for start in range(0, order.size, _CHUNK):
            k = order[start : start + _CHUNK]
            if bound_K[k[0]] >= min(below, result_K.min()):
                break
            result_K[k] = self._exact(e_K[k], f_K[k], [c[..., k] for c in changed])
        return result_K

    def _after(self, gone_K: np.ndarray, come_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 [3, K] and [K]: the sums of the rank that loses expert gone_K[k] and gets come_K[k]."""
        model, rank_K = self.model, self.home_rank_E[gone_K]
        sums_3K = self._sums_3G[:, rank_K] - model.draw_3EG[:, gone_K, rank_K] + model.draw_3EG[:, come_K, rank_K]
        if model.pairs_EE is None:
            return sums_3K, self._together_G[rank_K] - model.log_missed_E[gone_K] + model.log_missed_E[come_K]
        change_K = self._with_rank_EG[come_K, rank_K] - self._with_rank_EG[gone_K, rank_K] - model.pairs_EE[gone_K, come_K]
        return sums_3K, self._together_G[rank_K] + change_K

    def _bounds(self, e_K: np.ndarray, f_K: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """float64 [K]: the objective without out-ports; and what `_exact` needs: factors of both ranks, other exchange, load, slope."""
        model, a_K, b_K = self.model, self.home_rank_E[e_K], self.home_rank_E[f_K]
        node_a_K, node_b_K = model.node_of_rank_G[a_K], model.node_of_rank_G[b_K]
        squares_K, far_change = self._squares[0], []
        receive_DK, load_K = _max_without(self._receive_DG, a_K, b_K), _max_without(self._sums_3G[:1], a_K, b_K)[0]
        factors = []
        for rank_K, gone_K, come_K in ((a_K, e_K, f_K), (b_K, f_K, e_K)):
            sums_3K, together_K = self._after(gone_K, come_K)
            factor_K = model.factor(sums_3K[0], together_K)
            own_DK = model.receive_us(rank_K, sums_3K, factor_K)
            receive_DK, load_K = np.maximum(receive_DK, own_DK), np.maximum(load_K, sums_3K[0])
            squares_K = squares_K + self._rank_us(sums_3K, own_DK) ** 2 - self._rank_us_G[rank_K] ** 2
            far_change.append(sums_3K[2] * factor_K - (self._sums_3G[2] * self._factor_G)[rank_K])
            factors.append(factor_K)
        node_squares_K = self._squares[1]
        one_node = node_a_K == node_b_K
        receive_DK = np.maximum(receive_DK, _max_without(self._node_in_N * model.node_in_DN, node_a_K, node_b_K))
        for node_K, own_K, other_K, count_K in (
            (node_a_K, far_change[0], far_change[1], 1.0),
            (node_b_K, far_change[1], far_change[0], np.where(one_node, 0.0, 1.0)),
        ):
            in_DK = (self._node_in_N[node_K] + own_K + np.where(one_node, other_K, 0.0)) * model.node_in_DN[:, node_K]
            receive_DK = np.maximum(receive_DK, in_DK)
            node_squares_K = node_squares_K + count_K * (in_DK.sum(axis=0) ** 2 - self._node_us_N[node_K] ** 2)
        slope_K = self._scale[0] * squares_K + self._scale[1] * node_squares_K
        return model.layer_us(receive_DK, load_K) + slope_K, (*factors, receive_DK, load_K, slope_K)

    def _exact(self, e_K: np.ndarray, f_K: np.ndarray, changed: list[np.ndarray]) -> np.ndarray:
        """float64 [K]: the objective with the out-ports of all ranks."""
        model = self.model
        factor_a_K, factor_b_K, receive_DK, load_K, slope_K = changed
        near_KG, far_KG = self._sent_near_G[None], self._sent_far_G[None]
        for gone_K, come_K, factor_K in ((e_K, f_K, factor_a_K), (f_K, e_K, factor_b_K)):
            rank_K = self.home_rank_E[gone_K]
            selections_KG = self._selections_GG[rank_K] - model.counts_EG[gone_K] + model.counts_EG[come_K]
            change_KG = selections_KG * factor_K[:, None] - self._rows_GG[rank_K]
            change_KG[np.arange(rank_K.size), rank_K] = 0.0
            change_near_KG = change_KG * (model.node_of_rank_G == model.node_of_rank_G[rank_K][:, None])
            near_KG, far_KG = near_KG + change_near_KG, far_KG + (change_KG - change_near_KG)
        exchange_DK = np.maximum(receive_DK, self._send_us(near_KG, far_KG))
        return model.layer_us(exchange_DK, load_K) + slope_K

    def _send_us(self, near_KG: np.ndarray, far_KG: np.ndarray) -> np.ndarray:
        """float64 [D, K]: time of the busiest out-port of ranks and nodes."""
        model, node_KN = self.model, far_KG @ self.model.in_node_GN
        ports = zip(model.near_out_DG, model.far_out_DG, model.node_out_DN, strict=True)
        rank_node = [(np.maximum(near_KG * n, far_KG * f).max(axis=1), (node_KN * node).max(axis=1)) for n, f, node in ports]
        return np.array([np.maximum(rank_K, node_K) for rank_K, node_K in rank_node])

    def _rank_us(self, sums_3K: np.ndarray, receive_DK: np.ndarray) -> np.ndarray:
        return sums_3K[0] * self.model.cost.compute_us_per_row + receive_DK.sum(axis=0)


def _max_without(values_DX: np.ndarray, a_K: np.ndarray, b_K: np.ndarray) -> np.ndarray:
    """float64 [D, K]: the largest value of each row but those at a_K[k] and b_K[k]; 0 if none is left. The three largest tell."""
    largest_D3 = np.argsort(-values_DX, axis=1, kind="stable")[:, :3]
    result_DK = np.zeros((values_DX.shape[0], a_K.size))
    for result_K, values_X, largest in zip(result_DK, values_DX, largest_D3, strict=True):
        for x in largest[::-1]:
            result_K[(a_K != x) & (b_K != x)] = values_X[x]
    return result_DK
