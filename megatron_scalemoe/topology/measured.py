"""Measured rank pairs as a topology: read the probe's file, fit each pair, build a topology from it or correct the links of one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import Document, read_document
from megatron_scalemoe.topology.alpha_beta import AlphaBeta, fit_alpha_beta
from megatron_scalemoe.topology.graph import Link, Override, Topology, Vertex
from megatron_scalemoe.topology.routes import MAX_INCIDENCE_RANKS, Routes, compute_routes

# A correction below this share is not worth an override: repeated measurements differ as much.
_IGNORED_CHANGE = 0.02


class MeasuredPair(NamedTuple):
    """Messages from one rank to another: sizes, medians of their times, and the fit."""

    source: int
    target: int
    num_bytes: tuple[int, ...]
    time_us: tuple[float, ...]
    fit: AlphaBeta


class Measurement(NamedTuple):
    """All ordered pairs of G ranks, sources first. node_of_rank: int64 [G]. backend: `gloo` or `nccl`."""

    pairs: tuple[MeasuredPair, ...]
    node_of_rank: np.ndarray
    backend: str

    @property
    def num_ranks(self) -> int:
        return self.node_of_rank.size

    @property
    def bandwidth_GBps(self) -> np.ndarray:
        """float64 [G, G], source to target; infinite on the diagonal."""
        bandwidth_GG = np.full((self.num_ranks, self.num_ranks), np.inf)
        for pair in self.pairs:
            bandwidth_GG[pair.source, pair.target] = pair.fit.bandwidth_GBps
        return bandwidth_GG


def read_measurement(path: Path) -> Measurement:
    """The file that `ops.link_probe` writes. Raises `ScaleMoEError` naming file and field; also when a pair is missing or cannot be
    fitted."""
    document = read_document(path)
    node_of_rank = document.get(("node_of_rank",), list)
    for rank in range(len(node_of_rank)):
        if document.get(("node_of_rank", rank), int) not in range(len(node_of_rank)):
            raise document.error(("node_of_rank", rank), "must be the number of a node", found=node_of_rank[rank])
    pairs = {}
    for index in range(len(document.get(("pairs",), list))):
        pair = _read_pair(document, ("pairs", index), len(node_of_rank))
        pairs[pair.source, pair.target] = pair
    ranks = range(len(node_of_rank))
    missing = next(((i, j) for i in ranks for j in ranks if i != j and (i, j) not in pairs), None)
    if len(node_of_rank) < 2 or missing:
        problem = "expected every pair of two ranks or more, in both directions"
        raise document.error(("pairs",), problem, found=f"no pair {missing}" if missing else f"{len(node_of_rank)} ranks")
    backend = document.get(("backend",), str)
    return Measurement(tuple(pairs[key] for key in sorted(pairs)), np.array(node_of_rank, dtype=np.int64), backend)


def _read_pair(document: Document, field: tuple, ranks: int) -> MeasuredPair:
    document.get(field, dict)
    ends = []
    for key in ("source", "destination"):
        ends.append(document.get((*field, key), int))
        if not 0 <= ends[-1] < ranks:
            raise document.error((*field, key), f"must be a rank, 0 to {ranks - 1}", found=ends[-1])
    if ends[0] == ends[1]:
        raise document.error((*field, "destination"), "must differ from the source", found=ends[1])
    sizes = [document.get((*field, "bytes", i), int) for i in range(len(document.get((*field, "bytes"), list)))]
    times = [document.get((*field, "time_us", i), float) for i in range(len(document.get((*field, "time_us"), list)))]
    if len(sizes) != len(times):
        raise document.error((*field, "time_us"), "must have one time for each size", found=f"{len(times)} times, {len(sizes)} sizes")
    try:
        fit = fit_alpha_beta(np.array(sizes, dtype=np.float64), np.array(times))
    except ScaleMoEError as error:
        raise ScaleMoEError(f"{document.path}: rank {ends[0]} to rank {ends[1]}: {error}") from error
    except OverflowError as error:
        raise document.error((*field, "bytes"), "too large", found=error) from error
    return MeasuredPair(*ends, tuple(sizes), tuple(times), fit)


def measured_topology(measurement: Measurement, name: str = "measured") -> Topology:
    """A link of its own for each pair, with its fitted bandwidth and latency.

    Pairs were measured one at a time, so what they share (a NIC, a switch) is not in it: several exchanges at once look faster than they
    are. `corrected` keeps the sharing of a modelled topology.
    """
    local = np.zeros(measurement.num_ranks, dtype=int)
    names = []
    for rank, node in enumerate(measurement.node_of_rank):
        local[rank] = (measurement.node_of_rank[:rank] == node).sum()
        names.append(f"node{node}/gpu{local[rank]}")
    vertices = [Vertex(name, "gpu", int(node)) for name, node in zip(names, measurement.node_of_rank, strict=True)]
    links = [Link(names[p.source], names[p.target], p.fit.bandwidth_GBps, p.fit.alpha_us) for p in measurement.pairs]
    return Topology.build(name, vertices, links)


def corrected(topology: Topology, measurement: Measurement) -> Topology:
    """The topology with links set to what was measured, so far as pairs tell: a link that limits pairs in the model gets the rate of the
    fastest of them, and a link that no pair is limited by is raised to what a pair sent through it. Latencies stay.

    Raises `ScaleMoEError` when the ranks differ in number or in their nodes.
    """
    routes = _routes_for(topology, measurement)
    measured_X = measurement.bandwidth_GBps.ravel()
    incidence = routes.incidence().tocoo()
    keep = np.isfinite(measured_X[incidence.row])
    pair, link, share = incidence.row[keep], incidence.col[keep], incidence.data[keep]
    now_M = topology.bandwidth_GBps
    rate = measured_X[pair] * share
    limiting = now_M[link] / share <= routes.bandwidth_GBps.ravel()[pair] * (1 + 1e-9)
    fastest_M, fastest_limited_M = np.zeros(now_M.size), np.zeros(now_M.size)
    np.maximum.at(fastest_M, link, rate)
    np.maximum.at(fastest_limited_M, link[limiting], rate[limiting])
    new_M = np.maximum(np.where(fastest_limited_M > 0, fastest_limited_M, now_M), fastest_M)
    changed = np.flatnonzero(abs(new_M / now_M - 1) > _IGNORED_CHANGE)
    return topology.overridden(*(Override("->".join(topology.links[m]), bandwidth_GBps=float(new_M[m])) for m in changed))


def modelled_bandwidth_GBps(topology: Topology, measurement: Measurement) -> np.ndarray:
    """float64 [G, G]: what the topology says that each pair alone reaches. Raises `ScaleMoEError` as `corrected`."""
    return _routes_for(topology, measurement).bandwidth_GBps


def _routes_for(topology: Topology, measurement: Measurement) -> Routes:
    if not np.array_equal(topology.node_of_rank, measurement.node_of_rank):
        found = f"{_shape(topology.node_of_rank)} in {topology.name!r}, {_shape(measurement.node_of_rank)} measured"
        raise ScaleMoEError("the topology must have the measured ranks on the same nodes", found=found)
    if topology.num_ranks > MAX_INCIDENCE_RANKS:
        raise ScaleMoEError(f"at most {MAX_INCIDENCE_RANKS} ranks can be compared", found=topology.num_ranks)
    return compute_routes(topology)


def _shape(node_of_rank: np.ndarray) -> str:
    return f"{node_of_rank.size} ranks on {np.unique(node_of_rank).size} nodes"
