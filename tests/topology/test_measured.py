"""Measured pairs: reading the probe's file, the topology made of it, and links of a model corrected by it."""

import json

import numpy as np
import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.builders import BUILDERS
from megatron_scalemoe.topology.graph import Override
from megatron_scalemoe.topology.measured import corrected, measured_topology, modelled_bandwidth_GBps, read_measurement
from megatron_scalemoe.topology.routes import compute_routes
from tests.topology.small import SMALL

SIZES = [1000, 100_000, 10_000_000]


def probe_of(topology) -> dict:
    """What the probe would write on a cluster that is exactly as modelled."""
    routes = compute_routes(topology)
    pairs = [
        {
            "source": i,
            "destination": j,
            "bytes": list(SIZES),
            "time_us": [routes.latency_us[i, j] + size / (routes.bandwidth_GBps[i, j] * 1e3) for size in SIZES],
        }
        for i in range(topology.num_ranks)
        for j in range(topology.num_ranks)
        if i != j
    ]
    return {"pairs": pairs, "node_of_rank": topology.node_of_rank.tolist(), "backend": "nccl", "device": "made up"}


def read(tmp_path, probe: dict):
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    return read_measurement(tmp_path / "probe.json")


@pytest.mark.parametrize("name", ["rail_optimized", "dragonfly", "torus", "throttled", "pcie_box"])
def test_what_is_as_modelled_is_measured_so_and_leaves_the_model_as_it_is(tmp_path, name):
    truth = compute_routes(SMALL[name])
    measurement = read(tmp_path, probe_of(SMALL[name]))
    measured = measured_topology(measurement)
    routes = compute_routes(measured)
    assert measured.node_of_rank.tolist() == SMALL[name].node_of_rank.tolist()
    np.testing.assert_allclose(routes.bandwidth_GBps, truth.bandwidth_GBps, rtol=1e-6)
    np.testing.assert_allclose(routes.latency_us, truth.latency_us, atol=1e-6)
    after = corrected(SMALL[name], measurement)
    assert after.overrides == SMALL[name].overrides
    assert after.content_hash == SMALL[name].content_hash


@pytest.mark.parametrize(
    "override",
    [
        Override("node3", scale=0.5),
        Override("node3/nic0", scale=0.2),
        Override("node0/gpu1", bandwidth_GBps=7.0),
        Override("node1/nic0->group0/rail0", scale=0.25),
    ],
)
def test_a_link_that_differs_from_the_model_is_found(tmp_path, override):
    model = BUILDERS["rail_optimized"](nodes=4, gpus_per_node=3, spines=2)
    truth = model.overridden(override)
    measurement = read(tmp_path, probe_of(truth))
    after = corrected(model, measurement)
    np.testing.assert_allclose(modelled_bandwidth_GBps(after, measurement), modelled_bandwidth_GBps(truth, measurement), rtol=1e-6)
    # Which of two links in series is slow, pairs cannot tell; but it must be one of that node.
    node = override.target.partition("/")[0]
    assert after.overrides
    assert all(f"{node}/" in o.target for o in after.overrides)


def test_links_that_are_faster_than_the_model_are_raised(tmp_path):
    model = BUILDERS["rail_optimized"](nodes=4, gpus_per_node=3, spines=2)
    truth = model.overridden(*(Override(f"node{i}", scale=1.2) for i in range(4)))
    after = corrected(model, read(tmp_path, probe_of(truth)))
    assert after.graph.edges["node0/nic0", "group0/rail0"]["bandwidth_GBps"] == pytest.approx(60)
    np.testing.assert_allclose(compute_routes(after).bandwidth_GBps, compute_routes(truth).bandwidth_GBps, rtol=1e-6)


def test_a_spine_wider_than_one_pair_is_not_taken_for_slow(tmp_path):
    model = BUILDERS["fat_tree"](nodes=4, gpus_per_node=2, nodes_per_leaf=2, spines=1)
    truth = model.overridden(*(Override(f"node{i}", scale=0.5) for i in range(4)))
    after = corrected(model, read(tmp_path, probe_of(truth)))
    for link in (("leaf0", "spine0"), ("spine0", "leaf1")):
        assert after.graph.edges[link]["bandwidth_GBps"] == model.graph.edges[link]["bandwidth_GBps"]
    assert after.graph.edges["node0/nic0", "leaf0"]["bandwidth_GBps"] == pytest.approx(25)


def test_ranks_must_fit_the_topology(tmp_path):
    measurement = read(tmp_path, probe_of(SMALL["p4d"].subset(9)))
    with pytest.raises(ScaleMoEError, match="24 ranks on 3 nodes in 'p4d', 9 ranks on 2 nodes measured"):
        corrected(SMALL["p4d"], measurement)


def changed(field: tuple, value: object) -> dict:
    probe = probe_of(BUILDERS["ring"](gpus=2))
    place = probe
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = value
    return probe


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("pairs",), 3, "pairs: must be a list"),
        (("pairs",), [], r"no pair \(0, 1\)"),
        (("pairs", 1, "source"), 2, "pairs.1.source: must be a rank, 0 to 1"),
        (("pairs", 1, "destination"), 1, "pairs.1.destination: must differ"),
        (("pairs", 1, "bytes"), [1, 2], "3 times, 2 sizes"),
        (("pairs", 1, "bytes", 2), 10**400, "pairs.1.bytes.2: must be below"),
        (("pairs", 1, "time_us", 0), "fast", "pairs.1.time_us.0: must be a finite number"),
        (("pairs", 1, "time_us", 0), -1, "rank 1 to rank 0: measured times must be above 0"),
        (("pairs", 1, "time_us"), [3, 2, 1], "rank 1 to rank 0: larger messages did not take longer"),
        (("node_of_rank",), [0, 2], "node_of_rank.1: must be the number of a node"),
        (("node_of_rank",), [], "must be a rank|expected every pair"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, field, value, message):
    with pytest.raises(ScaleMoEError, match=message) as caught:
        read(tmp_path, changed(field, value))
    assert str(caught.value).startswith(str(tmp_path / "probe.json"))
