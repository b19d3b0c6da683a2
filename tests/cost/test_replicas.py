import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_scalemoe.cost.model import CostModel
from megatron_scalemoe.cost.replicas import replica_bytes, replica_us
from megatron_scalemoe.topology.ports import two_level_ports
from tests.placement.tiny import random_ports

COST = CostModel(hidden_size=8, ffn_hidden_size=4, micro_batches=4)


def replica_us_one_by_one(home_rank, hosts, cost, ports) -> float:
    """Every transfer added to the ports it crosses."""
    total = 0.0
    for to_replica in (True, False):
        used = {}
        for expert, home in enumerate(home_rank):
            for host in np.flatnonzero(hosts[expert]):
                if host == home:
                    continue
                source, target = (home, host) if to_replica else (host, home)
                a, b = ports.node_of_rank[source], ports.node_of_rank[target]
                kind = "scale_up_GBps" if a == b else "scale_out_GBps"
                crossed = [("out", kind, source), ("into", kind, target)]
                crossed += [("out", "node_GBps", a), ("into", "node_GBps", b)] if a != b else []
                for port in crossed:
                    used[port] = used.get(port, 0) + cost.expert_bytes
        total += max((count / getattr(getattr(ports, side), kind)[i] for (side, kind, i), count in used.items()), default=0.0)
    return total / 1e3 / cost.micro_batches


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.floats(0, 1))
def test_price_is_that_of_adding_each_transfer_to_its_ports(seed, nodes, per_node, density):
    rng = np.random.default_rng(seed)
    ranks = nodes * per_node
    ports = random_ports(rng, np.repeat(np.arange(nodes), per_node))
    home_rank = rng.permutation(np.repeat(np.arange(ranks), 2))
    hosts = (rng.random((ranks * 2, ranks)) < density) | (home_rank[:, None] == np.arange(ranks))
    assert replica_us(home_rank, hosts, COST, ports) == pytest.approx(replica_us_one_by_one(home_rank, hosts, COST, ports), rel=1e-12)


def test_a_replica_moves_one_expert_out_and_its_gradient_back_shared_by_the_micro_batches():
    hosts = np.eye(4, dtype=bool)
    hosts[0, 2] = True
    ports = two_level_ports(2, 2, scale_out_GBps=50)
    expected = 2 * COST.expert_bytes / 50e3 / 4
    assert replica_us(np.arange(4), hosts, COST, ports) == pytest.approx(expected)
    assert replica_us(np.arange(4), hosts, COST.replaced(micro_batches=1), ports) == pytest.approx(4 * expected)


def test_bytes_go_from_each_home_to_each_of_its_replicas():
    hosts = np.eye(4, dtype=bool)
    hosts[0, [2, 3]] = True
    hosts[1, 2] = True
    expected = np.zeros((4, 4))
    expected[0, [2, 3]] = expected[1, 2] = COST.expert_bytes
    np.testing.assert_array_equal(replica_bytes(np.arange(4), hosts, COST), expected)
