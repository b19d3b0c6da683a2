"""Topology files: YAML (or JSON) with `schema_version: 1`, either a builder's name and parameters, or all vertices and links.

    schema_version: 1                        schema_version: 1
    builder: rail_optimized                  name: two GPUs
    parameters: {nodes: 8}                   vertices:
    overrides:                               - {name: a, kind: gpu, node: 0}
    - {target: node3, scale: 0.5}            - {name: b, kind: gpu, node: 0}
                                             links:
                                             - {source: a, target: b, bandwidth_GBps: 50, latency_us: 1}
                                             - {source: b, target: a, bandwidth_GBps: 50, latency_us: 1}

`overrides` may stand in both forms: `target` is `node3`, a vertex, or `a->b`; then `scale` or `bandwidth_GBps`.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_scalemoe.files import SCHEMA_VERSION, Document, read_document, write_atomically
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.graph import Link, Override, Topology, TopologyError, Vertex


def load_topology(path: Path) -> Topology:
    """Reads either form. Raises `ScaleMoEError` naming file, line and field."""
    document = read_document(path)
    document.check_schema()
    try:
        topology = _load_built(document) if "builder" in document.data else _load_full(document)
    except TopologyError as error:
        raise document.error(error.field, error.problem, found=error.found, try_=error.try_) from error
    return _load_overrides(document, topology)


def save_topology(topology: Topology, path: Path, *, force: bool = False) -> None:
    """Writes the short form if a builder made the topology, else all vertices and links. Loading gives the same `content_hash`."""
    write_atomically(path, format_topology(topology), force=force)


def format_topology(topology: Topology) -> str:
    """The text of the topology's file."""
    head = {"schema_version": SCHEMA_VERSION}
    if topology.builder:
        parameters = {key: list(value) if isinstance(value, tuple) else value for key, value in topology.parameters.items()}
        text = yaml.safe_dump({**head, "builder": topology.builder, "parameters": parameters}, sort_keys=False)
        overrides = [{k: v for k, v in override._asdict().items() if v is not None} for override in topology.overrides]
        return text + (_rows("overrides", overrides) if overrides else "")
    vertices = [{k: v for k, v in vertex._asdict().items() if v is not None} for vertex in topology.vertices]
    links = [Link(u, v, d["bandwidth_GBps"], d["latency_us"])._asdict() for u, v, d in topology.graph.edges(data=True)]
    return yaml.safe_dump({**head, "name": topology.name}, sort_keys=False) + _rows("vertices", vertices) + _rows("links", links)


def _rows(field: str, rows: list[dict]) -> str:
    """A list with one line per item."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump({field: rows}, Dumper=dumper, sort_keys=False, default_flow_style=None, width=1000, allow_unicode=True)


def _load_built(document: Document) -> Topology:
    document.only_keys((), {"schema_version", "builder", "parameters", "overrides"})
    parameters = document.get(("parameters",), dict, {})
    for key in parameters:
        if not isinstance(key, str):
            raise document.error(("parameters",), "names must be text", found=repr(key))
    return build_topology(document.get(("builder",), str), parameters)


def _load_full(document: Document) -> Topology:
    document.only_keys((), {"schema_version", "name", "vertices", "links", "overrides"})
    name = document.get(("name",), str, document.path.stem)
    vertices, links = [], []
    for field in _items(document, "vertices", {"name", "kind", "node"}):
        node = document.get((*field, "node"), int, None)
        vertices.append(Vertex(document.get((*field, "name"), str), document.get((*field, "kind"), str), node))
    for field in _items(document, "links", {"source", "target", "bandwidth_GBps", "latency_us"}):
        ends = [document.get((*field, side), str) for side in ("source", "target")]
        links.append(Link(*ends, *(document.get((*field, key), float) for key in ("bandwidth_GBps", "latency_us"))))
    return Topology.build(name, vertices, links)


def _load_overrides(document: Document, topology: Topology) -> Topology:
    if "overrides" not in document.data:
        return topology
    for field in _items(document, "overrides", {"target", "scale", "bandwidth_GBps"}):
        values = [document.get((*field, key), float, None) for key in ("scale", "bandwidth_GBps")]
        override = Override(document.get((*field, "target"), str), *values)
        try:
            topology = topology.overridden(override)
        except TopologyError as error:
            raise document.error((*field, *error.field), error.problem, found=error.found, try_=error.try_) from error
    return topology


def _items(document: Document, name: str, allowed: set[str]) -> list[tuple]:
    """The fields of a list's items, each found to be a mapping with none but the allowed keys."""
    fields = [(name, index) for index in range(len(document.get((name,), list)))]
    for field in fields:
        document.get(field, dict)
        document.only_keys(field, allowed)
    return fields
