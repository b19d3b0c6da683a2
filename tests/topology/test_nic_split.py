"""Spreading over NICs at the same distance."""

import numpy as np
import pytest

from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.ports import ports_of
from megatron_scalemoe.topology.routes import compute_routes


def two_nodes(groups: list[list[float]]) -> Topology:
    """A GPU per node; each group of NICs (GB/s) hangs on a PCIe switch of its own, all on one fabric switch."""
    vertices, links = [("fabric", "switch", None)], []
    for node in range(2):
        vertices.append((f"g{node}", "gpu", node))
        for i, group in enumerate(groups):
            vertices.append((f"p{node}.{i}", "switch", node))
            links.append((f"g{node}", f"p{node}.{i}", 1000.0, 0.5))
            for j, speed_GBps in enumerate(group):
                vertices.append((f"n{node}.{i}.{j}", "nic", node))
                links += [(f"p{node}.{i}", f"n{node}.{i}.{j}", 1000.0, 0.5), (f"n{node}.{i}.{j}", "fabric", speed_GBps, 0.3)]
    return Topology.build("two", vertices, [link for a, b, *figures in links for link in ((a, b, *figures), (b, a, *figures))])


@pytest.mark.parametrize("groups", [[[25, 3.125]], [[25], [0.125]], [[25, 25], [25]], [[50, 25], [12.5], [25]]])
def test_all_nics_of_a_node_together_carry_what_they_can(groups):
    topology = two_nodes(groups)
    routes = compute_routes(topology)
    assert routes.bandwidth_GBps[0, 1] == pytest.approx(sum(map(sum, groups)))
    np.testing.assert_allclose(routes.bandwidth_GBps, ports_of(topology, routes).pair_GBps())


def test_one_nic_for_each_gpu_leaves_nothing_to_split():
    assert compute_routes(two_nodes([[25]])).nics is None
