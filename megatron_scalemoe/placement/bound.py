"""Lower bounds on what any placement of a layer costs (`objective.solution_cost(...).total_us`), to print beside every result.

`combinatorial` is closed form: what must pass the ports with each expert at its best place, on average; through the busiest port by the
pigeonhole principle (one of G ranks holds two of the G+1 heaviest experts ...); and through each port with the lightest experts behind
it. `lp` adds that all this must hold at once: the linear relaxation of the placement (shares between 0 and 1), solved by HiGHS.
Suffixes: G ranks, N nodes, E logical experts, X ports of one kind.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools

import numpy as np
from scipy.optimize import linprog

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.placement.port_program import PortFloor, PortProgram, port_program
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.placement.replica_bounds import least_copy_load, replicated_floor
from megatron_scalemoe.placement.row_model import RowBounds, RowModel, row_model
from megatron_scalemoe.topology.ports import Ports, PortSide
from megatron_scalemoe.units import BYTES_PER_US_PER_GBps

METHODS = ("auto", "combinatorial", "lp")
# `auto` solves the LP up to this many (expert, rank) pairs: 40 ms at 64 x 8, seconds above.
_LP_PAIRS = 1024
# Solvers of linear programs are right to 1e-7.
_LP_SAFETY = 1 - 1e-6
# Ranges of the largest load are halved until they are this narrow, or this often.
_NARROW = 1.01
_SPLITS, _SPLITS_OF_LARGE, _SMALL_PAIRS = 24, 3, 4096


def lower_bound_us(problem: LayerProblem, *, method: str = "auto") -> float:
    """A cost in us that no placement (with at most `problem.replicas` replicas, and any split of the tokens over them) can beat.

    method: `combinatorial`, `lp`, or `auto` (`lp` where it is quick). For the exchanges 1dh and 2dh the bound counts compute and the
    traffic between nodes only, one row per token and node, and is combinatorial. Raises `ScaleMoEError` for an unknown method.
    """
    if method not in METHODS:
        raise ScaleMoEError(f"method must be one of {', '.join(METHODS)}", found=repr(method))
    pairs = problem.num_experts * problem.num_ranks
    use_lp = problem.cost.exchange == "flat" and (method == "lp" or (method == "auto" and pairs <= _LP_PAIRS))
    without = _bound_us(dataclasses.replace(problem, replicas=0), use_lp)
    if not problem.replicas:
        return without
    return min(without, _bound_us(problem, use_lp=False) + _cheapest_replica_us(problem))


def _bound_us(problem: LayerProblem, use_lp: bool) -> float:
    """The bound where replicas are free: the least over all possible largest loads of a rank, found by best-first bisection of them.

    The larger the load of a rank, the more its compute takes, and the more deduplication can save.
    """
    least_load, group_ranks = (least_copy_load if problem.replicas else least_largest_load)(problem), (1, 1)
    if problem.cost.exchange != "flat":
        problem, group_ranks = _between_nodes_only(problem)
    model = row_model(problem, group_ranks=group_ranks)
    most_load = float(np.sort(problem.load)[::-1][: problem.homes_per_rank + problem.replica_slots_per_rank].sum())
    whole = _LoadRange.of(model, least_load, max(most_load, least_load) * (1 + 1e-9))
    splits = _SPLITS if problem.num_experts * problem.num_ranks <= _SMALL_PAIRS else _SPLITS_OF_LARGE
    ranges = [whole]
    while model.depends_on_load and splits and ranges[0].high > ranges[0].low * _NARROW:
        splits -= 1
        least = heapq.heappop(ranges)
        middle = float(np.sqrt(least.low * least.high))
        for low, high in ((least.low, middle), (middle, least.high)):
            heapq.heappush(ranges, _LoadRange.of(model, low, high))
    while use_lp and not ranges[0].is_lp:
        heapq.heapreplace(ranges, ranges[0].with_lp(model))
    return ranges[0].bound_us


@dataclasses.dataclass(frozen=True, eq=False)
class _LoadRange:
    """Placements whose most loaded rank has between `low` and `high` selections, and what they cost at least."""

    bound_us: float
    low: float
    high: float
    floor: PortFloor
    is_lp: bool = False

    def __lt__(self, other: _LoadRange) -> bool:
        return self.bound_us < other.bound_us

    @classmethod
    def of(cls, model: RowModel, low: float, high: float) -> _LoadRange:
        floor = (replicated_floor if model.problem.replicas else port_floor)(model, model.rows_at(high), low)
        return cls(floor.total_us(model.problem.cost), low, high, floor)

    def with_lp(self, model: RowModel) -> _LoadRange:
        bounds = model.rows_at(self.high)
        return dataclasses.replace(self, bound_us=_lp_us(port_program(model, bounds, self.floor), self.bound_us), is_lp=True)


def _between_nodes_only(problem: LayerProblem) -> tuple[LayerProblem, tuple[int, int]]:
    """Ports inside the nodes, and latencies, dropped; and the sizes of the nodes."""
    ports = problem.ports
    unlimited = np.full(problem.num_ranks, np.inf)
    into, out = (PortSide(unlimited, unlimited, side.node_GBps) for side in (ports.into, ports.out))
    nodes_only = dataclasses.replace(ports, into=into, out=out, scale_up_latency_us=0.0, scale_out_latency_us=0.0)
    return dataclasses.replace(problem, ports=nodes_only), (int(ports.node_sizes.min()), int(ports.node_sizes.max()))


def least_largest_load(problem: LayerProblem) -> float:
    """Selections of the most loaded rank, at least, without replicas."""
    load_E1 = np.broadcast_to(problem.load[:, None], (problem.num_experts, problem.num_ranks))
    return _least_busiest(load_E1, np.ones(problem.num_ranks), np.full(problem.num_ranks, problem.homes_per_rank))


def port_floor(model: RowModel, bounds: RowBounds, least_load: float) -> PortFloor:
    """The combinatorial bounds of the parts of the cost, where the most loaded rank has at least `least_load` selections."""
    problem, ports = model.problem, model.problem.ports
    us_per_row_GBps = problem.cost.row_bytes / BYTES_PER_US_PER_GBps
    # Dispatch leaves through the sources' out-ports and enters the experts' in-ports; combine goes back.
    dispatch_us = us_per_row_GBps * _busiest_rows(model, bounds, ports.into, ports.out)
    combine_us = dispatch_us if ports.same_both_ways else us_per_row_GBps * _busiest_rows(model, bounds, ports.out, ports.into)
    return PortFloor(
        dispatch_us=dispatch_us,
        combine_us=combine_us,
        fixed_us=problem.cost.exchange_overhead_us + _forced_latency_us(model, ports),
        compute_us=least_load * problem.cost.compute_us_per_row,
    )


def _forced_latency_us(model: RowModel, ports: Ports) -> float:
    enough = 1e-6 * model.counts_GE.sum()
    if model.far_EN.min(axis=1).sum() > enough:
        return ports.scale_out_latency_us
    if (model.near_EG + model.far_EN[:, ports.node_of_rank]).min(axis=1).sum() <= enough:
        return 0.0
    return ports.scale_up_latency_us if ports.num_nodes == 1 else min(ports.scale_up_latency_us, ports.scale_out_latency_us)


def _busiest_rows(model: RowModel, bounds: RowBounds, experts_GBps: PortSide, sources_GBps: PortSide) -> float:
    """Rows per GB/s of the busiest port, at least: ports on the experts' side, and on the sources' (near, far, node)."""
    problem, node_of_rank = model.problem, model.problem.ports.node_of_rank
    homes_G = np.full(problem.num_ranks, problem.homes_per_rank)
    homes_N = problem.ports.node_sizes * problem.homes_per_rank
    largest = 0.0
    for (a, b), pairs_E in itertools.product(bounds.rows, bounds.pairs_WE):
        near_EG = a * model.near_EG - b * pairs_E[:, None] * model.near_part_G
        far_EN = a * model.far_EN - b * pairs_E[:, None] * model.far_part_N
        kinds = ((near_EG, homes_G), (far_EN[:, node_of_rank], homes_G), (far_EN, homes_N))
        for (weight_EX, homes_X), expert_GBps, source_GBps in zip(kinds, experts_GBps, sources_GBps, strict=True):
            on_average = weight_EX.min(axis=1).sum() / source_GBps.sum()
            largest = max(largest, on_average, _least_busiest(weight_EX, expert_GBps, homes_X))
        beside = (model.near_beside_G, model.far_beside_N[node_of_rank], model.far_beside_N)
        rows = _rows_beside_heaviest(a * problem.load - b * pairs_E, int(problem.load.argmax()), model.slots)
        largest = max(largest, *(rows * float((part_X / GBps_X).min()) for part_X, GBps_X in zip(beside, experts_GBps, strict=True)))
    return max(largest, bounds.rows[0][0] * _most_sent(model, sources_GBps))


def _least_busiest(weight_EX: np.ndarray, capacity_X: np.ndarray, homes_X: np.ndarray) -> float:
    """The least possible largest sum of weight / capacity at a port, when each expert's tokens go to ports x and weigh weight_EX[e, x]."""
    least = float(weight_EX.min(axis=1).sum() / capacity_X.sum())
    lightest_first_E = np.sort((weight_EX / capacity_X).min(axis=1))
    most_E = lightest_first_E[::-1]
    by_port_X = -_sum_of_largest(-weight_EX.T, homes_X) / capacity_X
    # One of X ports has q+1 of the q X + 1 heaviest; what else it has is at least as much as the lightest that fill it.
    ports, fewest, most = homes_X.size, int(homes_X.min()), int(homes_X.max())
    lightest = np.concatenate([[0.0], np.cumsum(lightest_first_E)])
    crowded = [most_E[q * ports - q : q * ports + 1].sum() + lightest[fewest - q - 1 : most - q].min() for q in range(fewest)]
    return float(max(least, by_port_X.max(), max(crowded)))


def _rows_beside_heaviest(rows_E: np.ndarray, heaviest: int, slots: int) -> float:
    """Rows of the group with the heaviest expert, from everywhere: its own, and those of the experts that bring the fewest."""
    return max(0.0, float(rows_E[heaviest] + np.sort(np.delete(rows_E, heaviest))[: slots - 1].sum()))


def _most_sent(model: RowModel, sources_GBps: PortSide) -> float:
    """Selections per GB/s of the busiest source: what it keeps is at most what it sends to the best experts that fit beside it."""
    problem, node_of_rank = model.problem, model.problem.ports.node_of_rank
    homes_N = problem.homes_per_rank * problem.ports.node_sizes
    kept_G = _sum_of_largest(model.counts_GE, homes_N[node_of_rank])
    kept_N = _sum_of_largest(model.counts_NE, homes_N)
    near_G = -_sum_of_largest(-model.counts_GE, homes_N[node_of_rank] - problem.homes_per_rank)
    sent = (near_G, model.counts_GE.sum(axis=1) - kept_G, model.counts_NE.sum(axis=1) - kept_N)
    return sources_GBps.busiest(sent)


def _sum_of_largest(values_XE: np.ndarray, count_X: np.ndarray) -> np.ndarray:
    """float64 [X]: sum of the count_X[x] largest values of each row."""
    if not count_X.any():
        return np.zeros(count_X.size)
    count_X, most = np.minimum(count_X, values_XE.shape[1]), min(int(count_X.max()), values_XE.shape[1])
    largest = -np.sort(np.partition(-values_XE, most - 1, axis=1)[:, :most], axis=1)
    sums = np.cumsum(largest, axis=1)
    return np.where(count_X > 0, sums[np.arange(count_X.size), count_X - 1], 0.0)


def _cheapest_replica_us(problem: LayerProblem) -> float:
    """What the first replica costs, between the two ranks where it costs least."""
    GBps_GG = problem.ports.pair_GBps()
    us_GG = 1 / GBps_GG + 1 / GBps_GG.T
    np.fill_diagonal(us_GG, np.inf)
    return float(us_GG.min()) * problem.cost.expert_bytes / BYTES_PER_US_PER_GBps / problem.cost.micro_batches


def _lp_us(program: PortProgram, combinatorial_us: float) -> float:
    """The optimum of the linear relaxation; the combinatorial bound, which it never falls below, if HiGHS gives up."""
    result = linprog(
        program.objective,
        program.upper,
        program.upper_limit,
        program.equal,
        program.equal_limit,
        np.stack([program.least, program.most], axis=1),
    )
    return max(combinatorial_us, float(result.fun) * program.unit_us * _LP_SAFETY) if result.status == 0 else combinatorial_us
