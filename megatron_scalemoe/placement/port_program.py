"""The min-max program of a layer's placement over the ports: its relaxation is a bound (`bounds`), its integer solution exact (`exact`).

Columns: x[e, g], the share of expert e on rank g; X[e, n], on node n; S[g], pairs saved on rank g; d and c, times of the busiest port in
dispatch and in combine; m, compute; z, the layer. All times are in `unit_us`, so that the solver sees numbers near 1.
Suffixes: G ranks, N nodes, E logical experts, X ports of one kind.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.row_model import RowBounds, RowModel
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps


@dataclasses.dataclass(frozen=True, kw_only=True)
class PortFloor:
    """Lower bounds of the parts of a layer's cost, in us: of one exchange in each direction (without `fixed_us`, its latency and overhead),
    and of compute."""

    dispatch_us: float
    combine_us: float
    fixed_us: float
    compute_us: float

    def total_us(self, cost: CostModel) -> float:
        return cost.layer_us(2 * (self.dispatch_us + self.combine_us + 2 * self.fixed_us), self.compute_us)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PortProgram:
    """Minimise objective @ v with upper @ v <= upper_limit, equal @ v = equal_limit, least <= v <= most. The cost is that x `unit_us`.

    The first E x G columns are the shares, expert by expert.
    """

    objective: np.ndarray
    upper: sparse.csr_array
    upper_limit: np.ndarray
    equal: sparse.csr_array
    equal_limit: np.ndarray
    least: np.ndarray
    most: np.ndarray
    unit_us: float


def port_program(model: RowModel, bounds: RowBounds, floor: PortFloor) -> PortProgram:
    """The program of a flat exchange without replicas."""
    problem = model.problem
    experts, ranks, nodes = problem.num_experts, problem.num_ranks, problem.ports.num_nodes
    widths = (experts * ranks, experts * nodes, ranks, 4)
    unit_us = max(floor.total_us(problem.cost), 1e-9)
    blocks, limits = [], []
    for block, limit in (
        *_exchange_rows(model, bounds, unit_us),
        *_cost_rows(problem, floor, unit_us),
        *(((_every(-pairs_E, ranks), None, sparse.eye_array(ranks), None), np.zeros(ranks)) for pairs_E in bounds.pairs_WE),
    ):
        blocks.append(_row_block(block, limit.size, widths))
        limits.append(limit)
    one_E, one_G = np.ones(experts), np.ones(ranks)
    each_expert = sparse.kron(sparse.eye_array(experts), one_G[None, :])
    to_node = sparse.kron(sparse.eye_array(experts), sparse.csr_array(problem.ports.in_node_GN.T))
    equal = [(each_expert, None, None, None), (-to_node, sparse.eye_array(experts * nodes), None, None)]
    equal_limits = [one_E, np.zeros(experts * nodes)]
    each_rank = (_every(one_E, ranks), None, None, None)
    equal.append(each_rank)
    equal_limits.append(one_G * problem.homes_per_rank)
    columns, shares = sum(widths), widths[0] + widths[1]
    least = np.array([floor.dispatch_us, floor.combine_us, floor.compute_us, unit_us]) / unit_us
    return PortProgram(
        objective=np.eye(1, columns, columns - 1)[0],
        upper=sparse.vstack(blocks, format="csr"),
        upper_limit=np.concatenate(limits),
        equal=sparse.vstack([_row_block(b, n.size, widths) for b, n in zip(equal, equal_limits, strict=True)], format="csr"),
        equal_limit=np.concatenate(equal_limits),
        least=np.concatenate([np.zeros(columns - 4), least]),
        most=np.concatenate([np.ones(shares), np.full(columns - shares, np.inf)]),
        unit_us=unit_us,
    )


def _exchange_rows(model: RowModel, bounds: RowBounds, unit_us: float) -> list[tuple]:
    """What passes each port takes no longer than d (dispatch), than c (combine): blocks of (x, X, S, times), and limits."""
    problem, ports = model.problem, model.problem.ports
    us = problem.cost.row_bytes / BYTES_PER_US_PER_GBps / unit_us
    # Where ports are the same both ways, d and c are one number: dispatch alone tells it, and `_cost_rows` takes it twice.
    directions = ((0, ports.into, ports.out), (1, ports.out, ports.into))[: 1 if ports.same_both_ways else 2]
    blocks = []
    for a, b in bounds.rows:
        rows = _rows_at_ports(model, a, b)
        for time, experts_GBps, sources_GBps in directions:
            for (x, big_x, saved, limit), GBps in zip(rows, (*experts_GBps, *sources_GBps), strict=True):
                used = np.flatnonzero(np.isfinite(GBps))
                scale = sparse.diags_array(us / GBps[used]) if used.size else None
                if scale is None:
                    continue
                parts = [None if part is None else scale @ sparse.csr_array(part)[used] for part in (x, big_x, saved)]
                busy = sparse.csr_array((-np.ones(used.size), (np.arange(used.size), np.full(used.size, time))), shape=(used.size, 4))
                blocks.append(((*parts, busy), us / GBps[used] * limit[used]))
    return blocks


def _rows_at_ports(model: RowModel, a: float, b: float) -> list[tuple]:
    """Rows into ranks from their node, from other nodes, into nodes; and out of ranks and nodes: (x, X, S, -constant)."""
    problem = model.problem
    node_of_rank, in_node_GN = problem.ports.node_of_rank, problem.ports.in_node_GN
    ranks, nodes = in_node_GN.shape
    apart_GG = 1.0 - in_node_GN @ in_node_GN.T
    beside_GG = 1.0 - apart_GG - np.eye(ranks)
    zero_G, zero_N = np.zeros(ranks), np.zeros(nodes)
    lost_N = b * model.far_part_N
    to_own_node = _every_node(model.counts_GE, node_of_rank, nodes)
    return [
        (_pick(a * model.near_EG), None, np.diag(-b * model.near_part_G), zero_G),
        (_pick(a * model.far_EN[:, node_of_rank]), None, np.diag(-lost_N[node_of_rank]), zero_G),
        (None, _pick(a * model.far_EN), -lost_N[:, None] * in_node_GN.T, zero_N),
        (_pick(-a * model.counts_GE.T), a * to_own_node, -b * model.source_part_G[:, None] * beside_GG, zero_G),
        (None, -a * to_own_node, -b * model.source_part_G[:, None] * apart_GG, -a * model.counts_GE.sum(axis=1)),
        (None, _pick(-a * model.counts_NE.T), -b * model.source_part_N[:, None] * (1 - in_node_GN.T), -a * model.counts_NE.sum(axis=1)),
    ]


def _cost_rows(problem: LayerProblem, floor: PortFloor, unit_us: float) -> list[tuple]:
    """m covers each rank's compute; z covers the layer: the two lines whose maximum is communication and compute after overlap."""
    ranks, cost = problem.num_ranks, problem.cost
    compute = _every(problem.load * cost.compute_us_per_row / unit_us, ranks)
    on_m = np.tile([[0.0, 0.0, -1.0, 0.0]], (ranks, 1))
    fixed, hidden = 4 * floor.fixed_us / unit_us, 1 - cost.overlap
    d_c = np.array([4.0, 0.0]) if problem.ports.same_both_ways else np.array([2.0, 2.0])
    layer = np.array([[*d_c, hidden, -1.0], [*(hidden * d_c), 1.0, -1.0]])
    return [((compute, None, None, on_m), np.zeros(ranks)), ((None, None, None, layer), -fixed * np.array([1.0, hidden]))]


def _pick(weight_EX: np.ndarray) -> sparse.csr_array:
    """[X, E X]: row x has weight_EX[e, x] in the column of (e, x)."""
    experts, ports = weight_EX.shape
    return sparse.csr_array((weight_EX.reshape(-1), (np.tile(np.arange(ports), experts), np.arange(weight_EX.size))))


def _every(weight_E: np.ndarray, ranks: int) -> sparse.csr_array:
    return _pick(np.repeat(weight_E[:, None], ranks, axis=1))


def _every_node(counts_GE: np.ndarray, node_of_rank: np.ndarray, nodes: int) -> sparse.csr_array:
    """[G, E N]: row g has counts_GE[g, e] in the column of (e, the node of g)."""
    ranks, experts = counts_GE.shape
    columns = np.arange(experts) * nodes + node_of_rank[:, None]
    rows = np.repeat(np.arange(ranks), experts)
    return sparse.csr_array((counts_GE.reshape(-1), (rows, columns.reshape(-1))), shape=(ranks, experts * nodes))


def _row_block(block: tuple, height: int, widths: tuple[int, ...]) -> sparse.csr_array:
    empty = [sparse.csr_array((height, width)) for width in widths]
    return sparse.hstack([nothing if part is None else part for part, nothing in zip(block, empty, strict=True)], format="csr")
