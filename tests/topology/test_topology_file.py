"""Topology files: both forms come back the same, and every mistake is named with its line."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.graph import Override
from megatron_scalemoe.topology.health import find_suspicious
from megatron_scalemoe.topology.ports import ports_of
from megatron_scalemoe.topology.routes import compute_routes
from megatron_scalemoe.topology.topology_file import format_topology, load_topology, save_topology
from tests.topology.small import SMALL

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "topologies"
FULL = """\
schema_version: 1
name: two GPUs
vertices:
- {name: a, kind: gpu, node: 0}
- {name: s, kind: switch}
- {name: b, kind: gpu, node: 1}
links:
- {source: a, target: s, bandwidth_GBps: 50, latency_us: 1}
- {source: s, target: a, bandwidth_GBps: 50, latency_us: 1}
- {source: b, target: s, bandwidth_GBps: 50, latency_us: 1}
- {source: s, target: b, bandwidth_GBps: 50, latency_us: 1}
overrides:
- {target: node1, scale: 0.5}
"""
BUILT = """\
schema_version: 1
builder: rail_optimized
parameters:
  nodes: 2
  gpus_per_node: 2
overrides:
- {target: node1, scale: 0.5}
"""


@pytest.mark.parametrize("name", SMALL)
def test_a_built_topology_comes_back_from_its_short_form(name, tmp_path):
    topology, path = SMALL[name], tmp_path / "topo.yaml"
    save_topology(topology, path)
    loaded = load_topology(path)
    assert loaded.content_hash == topology.content_hash
    assert loaded.overrides == topology.overrides
    assert len(path.read_text().splitlines()) < 15
    assert format_topology(loaded) == format_topology(topology)


def test_every_example_is_a_sound_cluster():
    found = {}
    for path in EXAMPLES.glob("*.yaml"):
        topology = load_topology(path)
        if topology.num_ranks <= 256:  # larger ones take seconds
            routes = compute_routes(topology)
            found[path.stem] = {finding.where for finding in find_suspicious(topology, routes, ports_of(topology, routes))}
    assert found.pop("p4d_heterogeneous") == {"node 3"}
    assert len(found) > 4
    assert not any(found.values())


@pytest.mark.parametrize("name", ["torus", "p4d", "throttled"])
def test_any_topology_comes_back_from_its_full_form(name, tmp_path):
    topology, path = dataclasses.replace(SMALL[name], builder=None), tmp_path / "topo.yaml"
    save_topology(topology, path)
    loaded = load_topology(path)
    assert loaded.content_hash == topology.content_hash
    assert (loaded.name, loaded.links, loaded.ranks) == (topology.name, topology.links, topology.ranks)
    assert loaded.builder is None


def test_small_numbers_and_strange_names_survive(tmp_path):
    topology = dataclasses.replace(SMALL["ring"].overridden(Override("node0", bandwidth_GBps=1e-07)), builder=None, name="no: 'ring' # 1")
    save_topology(topology, tmp_path / "a.yaml")
    loaded = load_topology(tmp_path / "a.yaml")
    assert (loaded.name, loaded.content_hash) == (topology.name, topology.content_hash)


def test_json_is_read_too(tmp_path):
    path = tmp_path / "topo.json"
    path.write_text(json.dumps({"schema_version": 1, "builder": "torus", "parameters": {"dims": [3, 4], "gpus_per_node": 4}}))
    assert load_topology(path).content_hash == SMALL["torus"].content_hash


def test_overrides_apply_to_both_forms(tmp_path):
    for text, link in ((FULL, ("s", "b")), (BUILT, ("group0/rail0", "node1/nic0"))):
        (tmp_path / "t.yaml").write_text(text)
        assert load_topology(tmp_path / "t.yaml").graph.edges[link]["bandwidth_GBps"] == 25


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [
        (FULL, "kind: switch", "knd: switch", "t.yaml:5: vertices.1.knd: unknown field"),
        (FULL, "target: b, bandwidth_GBps: 50", "target: b, bandwidth_GBps: .nan", "t.yaml:11: links.3.bandwidth_GBps: must be a finite"),
        (FULL, "target: b, bandwidth_GBps: 50,", "target: b,", "t.yaml:11: links.3: 'bandwidth_GBps' is missing"),
        (FULL, "- {source: s, target: b", "- 3\n- {source: s, target: b", "t.yaml:11: links.3: must be a mapping"),
        (FULL, "schema_version: 1", "schema_version: 2", "t.yaml:1: schema_version: must be 1"),
        (FULL, "name: two GPUs", "nane: two GPUs", "t.yaml:2: nane: unknown field"),
        (FULL, "target: node1", "target: node7", "t.yaml:13: overrides.0.target: no link matches"),
        (FULL, "scale: 0.5", "scale: -1", "t.yaml:13: overrides.0.scale: must be finite and above 0"),
        (BUILT, "rail_optimized", "rail", "t.yaml:2: builder: must be one of dgx_a100"),
        (BUILT, "nodes: 2", "nods: 2", "t.yaml:4: parameters.nods: rail_optimized has no such parameter"),
        (BUILT, "gpus_per_node: 2", "3: 2", "t.yaml:5: parameters.*must be text"),
        (BUILT, "builder: rail_optimized", "builder: rail_optimized\nlinks: []", "t.yaml:3: links: unknown field"),
        (BUILT, "  nodes: 2\n  gpus_per_node: 2", "- 2", "t.yaml:3: parameters: must be a mapping"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path, text, old, new, message):
    assert text.count(old) == 1
    path = tmp_path / "t.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ScaleMoEError, match=message):
        load_topology(path)
