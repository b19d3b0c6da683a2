"""Small problems for the solvers' tests: experts in co-activated clusters, drawn token by token."""

import numpy as np

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.placement.problem import LayerProblem
from megatron_scalemoe.topology.ports import Ports, PortSide, two_level_ports
from megatron_scalemoe.traffic.trace import LayerTraffic


def clustered_problem(
    seed: int,
    *,
    nodes: int = 1,
    ranks_per_node: int = 8,
    experts: int = 64,
    topk: int = 2,
    tokens: int = 4000,
    affinity: float = 0.0,
    coactivation: bool = True,
    ports: Ports | None = None,
    cost: CostModel | None = None,
    replicas: int = 0,
) -> LayerProblem:
    """Each token prefers one cluster of experts (hidden by a permutation); with `affinity` a rank's tokens prefer that rank's cluster."""
    rng, ranks = np.random.default_rng(seed), nodes * ranks_per_node
    cluster_E = rng.permutation(np.arange(experts) * ranks // experts)
    popularity_E = rng.gamma(1.0, 1.0, experts) + 0.05
    source_T = rng.integers(ranks, size=tokens)
    cluster_T = np.where(rng.random(tokens) < affinity, source_T, rng.integers(ranks, size=tokens))
    taste_TE = np.log(popularity_E) + rng.gumbel(size=(tokens, experts)) + 4.0 * (cluster_E == cluster_T[:, None])
    chosen_TE = np.zeros((tokens, experts))
    np.put_along_axis(chosen_TE, np.argpartition(-taste_TE, topk - 1, axis=1)[:, :topk], 1.0, axis=1)
    counts_GE = np.zeros((ranks, experts))
    np.add.at(counts_GE, source_T, chosen_TE)
    together_EE = chosen_TE.T @ chosen_TE
    np.fill_diagonal(together_EE, 0.0)
    traffic = LayerTraffic(counts_GE, together_EE if coactivation else None, counts_GE.sum(axis=0)[None], topk)
    ports = ports or two_level_ports(nodes, ranks_per_node)
    return LayerProblem(traffic=traffic, ports=ports, cost=cost or CostModel(), replicas=replicas)


def uneven_ports() -> Ports:
    """Eight ranks on nodes of 3 and 5; every port different, and different in and out."""
    rng = np.random.default_rng(5)
    up_in, up_out, out_in, out_out = rng.uniform(20, 60, (4, 8))
    return Ports(
        node_of_rank=np.array([0, 0, 0, 1, 1, 1, 1, 1]),
        into=PortSide(up_in, out_in, np.array([80.0, 100.0])),
        out=PortSide(up_out, out_out, np.array([110.0, 70.0])),
        scale_up_latency_us=1.0,
        scale_out_latency_us=5.0,
    )


def assert_balanced(problem: LayerProblem, home_rank_E: np.ndarray) -> None:
    """Each rank has its E/G homes."""
    assert home_rank_E.dtype == np.int64
    assert np.bincount(home_rank_E, minlength=problem.num_ranks).tolist() == [problem.homes_per_rank] * problem.num_ranks
