"""`Topology`: the cluster as an immutable directed graph of GPUs, NICs, switches and hosts. Links have a bandwidth and a latency."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import networkx as nx
import numpy as np

from megatron_scalemoe.errors import ScaleMoEError

KINDS = ("gpu", "switch", "nic", "node")


class Vertex(NamedTuple):
    """`node`: number of the machine it sits in, None for the fabric's switches. The kind `node` is a host: its CPUs and root complex."""

    name: str
    kind: str
    node: int | None


class Link(NamedTuple):
    """One direction. GB/s = 10^9 bytes/s; us."""

    source: str
    target: str
    bandwidth_GBps: float
    latency_us: float


class Override(NamedTuple):
    """A change of some links' bandwidth: multiplied by `scale`, or set to `bandwidth_GBps` each. Exactly one of the two is given.

    target: `node3` (its links to other nodes and to the fabric), the name of a vertex (all its links), or `source->target` (one link).
    """

    target: str
    scale: float | None = None
    bandwidth_GBps: float | None = None


class UnreachableError(ScaleMoEError):
    """Each vertex and link is fine, but some GPU cannot reach another."""


@dataclasses.dataclass(frozen=True, eq=False)
class Topology:
    """Made by `Topology.build` or a builder. G ranks (GPUs), M directed links; rank i is the i-th gpu vertex.

    graph: frozen; vertices have `kind` and `node`, edges `bandwidth_GBps` and `latency_us`.
    builder, parameters, overrides: how it was built, if by a builder, so that its file can be short.
    """

    name: str
    graph: nx.DiGraph
    builder: str | None = None
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)
    overrides: tuple[Override, ...] = ()

    @classmethod
    def build(cls, name: str, vertices: Iterable[Vertex | tuple], links: Iterable[Link | tuple]) -> Topology:
        """From plain lists. Raises `ScaleMoEError` unless every GPU can reach every other over valid links."""
        graph = nx.DiGraph()
        for index, vertex in enumerate(vertices):
            _add_vertex(graph, index, Vertex(*vertex))
        for index, link in enumerate(links):
            _add_link(graph, index, Link(*link))
        topology = cls(name, nx.freeze(graph))
        _check_nodes(topology)
        pair = _unreachable_pair(topology)
        if pair:
            problem, try_ = "{} cannot reach {}".format(*pair), "links through switches: a GPU forwards only when linked to GPUs alone"
            raise UnreachableError(problem, field=("links",), try_=try_)
        return topology

    @functools.cached_property
    def vertices(self) -> tuple[Vertex, ...]:
        return tuple(Vertex(name, data["kind"], data["node"]) for name, data in self.graph.nodes(data=True))

    @functools.cached_property
    def ranks(self) -> tuple[str, ...]:
        """Names of the GPUs, in rank order."""
        return tuple(v.name for v in self.vertices if v.kind == "gpu")

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)

    @functools.cached_property
    def node_of_rank(self) -> np.ndarray:
        """int64 [G]; nodes count up from 0."""
        return np.array([v.node for v in self.vertices if v.kind == "gpu"], dtype=np.int64)

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank.max()) + 1

    @functools.cached_property
    def links(self) -> tuple[tuple[str, str], ...]:
        """(source, target) of each link; this order is the M axis everywhere."""
        return tuple(self.graph.edges)

    @functools.cached_property
    def full_links(self) -> tuple[Link, ...]:
        """`links` with their figures."""
        return tuple(Link(u, v, data["bandwidth_GBps"], data["latency_us"]) for u, v, data in self.graph.edges(data=True))

    @functools.cached_property
    def bandwidth_GBps(self) -> np.ndarray:
        """float64 [M]."""
        return np.array([link.bandwidth_GBps for link in self.full_links], dtype=np.float64)

    @functools.cached_property
    def latency_us(self) -> np.ndarray:
        """float64 [M]."""
        return np.array([link.latency_us for link in self.full_links], dtype=np.float64)

    @functools.cached_property
    def endpoints(self) -> frozenset[str]:
        """The GPUs that forward nothing. A GPU forwards only in a mesh of GPUs (torus, ring): when it is linked to GPUs alone, and some
        pair of GPUs has no link of its own."""
        degree = len(self.ranks) - 1
        complete = all(sum(self.graph.nodes[v]["kind"] == "gpu" for v in self.graph.successors(gpu)) == degree for gpu in self.ranks)
        mesh = {g for g in self.ranks if all(self.graph.nodes[v]["kind"] == "gpu" for v in nx.all_neighbors(self.graph, g))}
        return frozenset(self.ranks) if complete else frozenset(self.ranks) - mesh

    @functools.cached_property
    def content_hash(self) -> str:
        """Equal for the same vertices, rank order and links, whatever the name and the file form."""
        links = sorted(self.full_links)
        vertices = sorted((v.name, v.kind, -1 if v.node is None else v.node) for v in self.vertices)
        return hashlib.sha256(json.dumps([self.ranks, vertices, links]).encode()).hexdigest()

    def built_by(self, builder: str, parameters: Mapping[str, object]) -> Topology:
        """The same topology, which knows how it was built."""
        return dataclasses.replace(self, builder=builder, parameters=dict(parameters))

    def overridden(self, *overrides: Override) -> Topology:
        """A new topology with these changes made one after the other. Raises `ScaleMoEError` on an unknown target or bad value."""
        graph = nx.DiGraph(self.graph)
        for override in overrides:
            _check_override(override)
            for link in self._links_of(override.target):
                data = graph.edges[link]
                new = override.bandwidth_GBps if override.scale is None else data["bandwidth_GBps"] * override.scale
                data["bandwidth_GBps"] = float(new)
        return dataclasses.replace(self, graph=nx.freeze(graph), overrides=(*self.overrides, *overrides))

    def _links_of(self, target: str) -> list[tuple[str, str]]:
        node_of = dict(self.graph.nodes(data="node"))
        source, arrow, end = (part.strip() for part in target.partition("->"))
        number = target.removeprefix("node")
        if arrow:
            found = [(source, end)] if self.graph.has_edge(source, end) else []
        elif target in self.graph:
            found = [link for link in self.links if target in link]
        elif target.startswith("node") and number.isdecimal():
            found = [(u, v) for u, v in self.links if (node_of[u] == int(number)) != (node_of[v] == int(number))]
        else:
            found = []
        if not found:
            try_ = f"node0..node{self.num_nodes - 1} (links that leave the node), a vertex such as {self.ranks[0]}, or a link 'a->b'"
            raise ScaleMoEError("no link matches", field=("target",), found=repr(target), try_=try_)
        return found

    def subset(self, num_ranks: int) -> Topology:
        """The first ranks alone, for a trace of fewer ranks than the cluster has: without the other GPUs and all that then leads nowhere.
        Raises `ScaleMoEError` when there are not so many, or they cannot reach each other without the others."""
        if not 1 <= num_ranks <= self.num_ranks:
            raise ScaleMoEError(f"topology {self.name!r} has {self.num_ranks} ranks", found=f"{num_ranks} wanted")
        if num_ranks == self.num_ranks:
            return self
        graph = nx.DiGraph(self.graph)
        graph.remove_nodes_from(self.ranks[num_ranks:])
        while dead_ends := [v for v, kind in graph.nodes(data="kind") if kind != "gpu" and len(set(nx.all_neighbors(graph, v))) <= 1]:
            graph.remove_nodes_from(dead_ends)
        vertices = [v for v in self.vertices if v.name in graph]
        links = [link for link in self.full_links if link.source in graph and link.target in graph]
        return Topology.build(f"{self.name}, first {num_ranks} ranks", vertices, links)


def _add_vertex(graph: nx.DiGraph, index: int, vertex: Vertex) -> None:
    name, kind, node = vertex
    if not isinstance(name, str) or not name or name != name.strip() or "->" in name or not name.isprintable():
        raise ScaleMoEError("must be a printable name without '->'", field=("vertices", index, "name"), found=repr(name))
    if name in graph:
        raise ScaleMoEError("must differ from the other vertices' names", field=("vertices", index, "name"), found=repr(name))
    if kind not in KINDS:
        raise ScaleMoEError(f"must be one of {', '.join(KINDS)}", field=("vertices", index, "kind"), found=repr(kind))
    if not (node is None and kind != "gpu") and not (type(node) is int and node >= 0):
        problem = "must be the number of its node, 0 or more" + ("" if kind == "gpu" else "; or left out: a part of the fabric")
        raise ScaleMoEError(problem, field=("vertices", index, "node"), found=repr(node))
    graph.add_node(name, kind=kind, node=node)


def _add_link(graph: nx.DiGraph, index: int, link: Link) -> None:
    for side in ("source", "target"):
        if getattr(link, side) not in graph:
            raise ScaleMoEError("must be the name of a vertex", field=("links", index, side), found=repr(getattr(link, side)))
    if link.source == link.target:
        raise ScaleMoEError("must differ from the source", field=("links", index, "target"), found=repr(link.target))
    if graph.has_edge(link.source, link.target):
        problem, try_ = "this link was already given", "one link with the sum of the bandwidths"
        raise ScaleMoEError(problem, field=("links", index, "target"), found=f"{link.source} -> {link.target}", try_=try_)
    if not (math.isfinite(link.bandwidth_GBps) and link.bandwidth_GBps > 0):
        raise ScaleMoEError("must be finite and above 0", field=("links", index, "bandwidth_GBps"), found=link.bandwidth_GBps)
    if not (math.isfinite(link.latency_us) and link.latency_us >= 0):
        raise ScaleMoEError("must be finite and 0 or more", field=("links", index, "latency_us"), found=link.latency_us)
    graph.add_edge(link.source, link.target, bandwidth_GBps=float(link.bandwidth_GBps), latency_us=float(link.latency_us))


def _check_nodes(topology: Topology) -> None:
    if not topology.ranks:
        raise ScaleMoEError("a topology needs a vertex of kind gpu", field=("vertices",))
    # So that the first ranks of a cluster are a cluster too, and arrays per node have no holes.
    expected = 0
    for index, vertex in enumerate(topology.vertices):
        if vertex.kind == "gpu":
            if vertex.node > expected:
                problem = f"the GPUs' nodes must count up from 0 in rank order: here {expected} or less"
                raise ScaleMoEError(problem, field=("vertices", index, "node"), found=vertex.node)
            expected = max(expected, vertex.node + 1)


def _unreachable_pair(topology: Topology) -> tuple[str, str] | None:
    """The first two GPUs without a route, if any."""
    graph, endpoints = topology.graph, topology.endpoints
    transit = graph.subgraph(set(graph) - endpoints).copy()
    # Nearly always one strongly connected fabric touches every GPU in both directions; then there is nothing to search.
    for component in nx.strongly_connected_components(transit):
        if all(
            gpu in component or not (component.isdisjoint(graph.successors(gpu)) or component.isdisjoint(graph.predecessors(gpu)))
            for gpu in topology.ranks
        ):
            return None
    for gpu in topology.ranks:
        reached, frontier = {gpu}, [gpu]
        while frontier:
            new = {v for u in frontier for v in graph.successors(u)} - reached
            reached |= new
            frontier = [v for v in new if v not in endpoints]
        for other in topology.ranks:
            if other not in reached:
                return gpu, other
    return None


def _check_override(override: Override) -> None:
    if (override.scale is None) == (override.bandwidth_GBps is None):
        raise ScaleMoEError(f"override of {override.target}: give either scale or bandwidth_GBps")
    name, value = ("bandwidth_GBps", override.bandwidth_GBps) if override.scale is None else ("scale", override.scale)
    if not (math.isfinite(value) and value > 0):
        raise ScaleMoEError("must be finite and above 0", field=(name,), found=value)
