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
from typing import Any

import yaml
from pydantic import Field

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document, write_atomically
from megatron_scalemoe.topology.builders import build_topology
from megatron_scalemoe.topology.graph import Link, Override, Topology, Vertex
from megatron_scalemoe.typed import Model, Number, SchemaVersion
from megatron_scalemoe.version import SCHEMA_VERSION


class _Vertex(Model):
    name: str
    kind: str
    node: int | None = None


class _Link(Model):
    source: str
    target: str
    bandwidth_GBps: Number
    latency_us: Number


class _Override(Model):
    target: str
    scale: Number | None = None
    bandwidth_GBps: Number | None = None


class _Built(Model):
    schema_version: SchemaVersion
    builder: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    overrides: list[_Override] = Field(default_factory=list)


class _Full(Model):
    schema_version: SchemaVersion
    name: str | None = None
    vertices: list[_Vertex]
    links: list[_Link]
    overrides: list[_Override] = Field(default_factory=list)


def load_topology(path: Path) -> Topology:
    """Reads either form. Raises `ScaleMoEError` naming file, line and field."""
    document = read_document(path)
    file = document.parse(_Built if "builder" in document.data else _Full)
    try:
        if isinstance(file, _Built):
            topology = build_topology(file.builder, file.parameters)
        else:
            vertices = [Vertex(vertex.name, vertex.kind, vertex.node) for vertex in file.vertices]
            links = [Link(link.source, link.target, link.bandwidth_GBps, link.latency_us) for link in file.links]
            topology = Topology.build(path.stem if file.name is None else file.name, vertices, links)
    except ScaleMoEError as error:
        raise document.located(error) from error
    for index, override in enumerate(file.overrides):
        try:
            topology = topology.overridden(Override(override.target, override.scale, override.bandwidth_GBps))
        except ScaleMoEError as error:
            field = ("overrides", index, *error.field)
            raise error.at(document.place(field), field) from error
    return topology


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
    links = [link._asdict() for link in topology.full_links]
    return yaml.safe_dump({**head, "name": topology.name}, sort_keys=False) + _rows("vertices", vertices) + _rows("links", links)


def _rows(field: str, rows: list[dict]) -> str:
    """A list with one line per item."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump({field: rows}, Dumper=dumper, sort_keys=False, default_flow_style=None, width=1000, allow_unicode=True)
