"""Measured rank pairs as a topology: read the probe's file, fit each pair, build a topology from it or correct the links of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.files import read_document
from megatron_scalemoe.topology.alpha_beta import AlphaBeta, fit_alpha_beta
from megatron_scalemoe.topology.graph import Link, Override, Topology, Vertex
from megatron_scalemoe.topology.routes import MAX_INCIDENCE_RANKS, Routes, compute_routes
from megatron_scalemoe.typed import Facts, Number, refused

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


class _Pair(Facts):
    source: int
    destination: int
    bytes: list[Annotated[int, Field(ge=0, lt=2**63)]]
    time_us: list[Number]

    @model_validator(mode="after")
    def _fits_itself(self) -> _Pair:
        if self.source == self.destination:
            raise refused("must differ from the source", field=("destination",), found=self.destination)
        if len(self.bytes) != len(self.time_us):
            found = f"{len(self.time_us)} times, {len(self.bytes)} sizes"
            raise refused("must have one time for each size", field=("time_us",), found=found)
        return self


class _Probe(Facts):
    node_of_rank: list[int]
    backend: str
    pairs: list[_Pair]

    @model_validator(mode="after")
    def _all_pairs(self) -> _Probe:
        ranks = range(len(self.node_of_rank))
        for rank, node in enumerate(self.node_of_rank):
            if node not in ranks:
                raise refused("must be the number of a node", field=("node_of_rank", rank), found=node)
        for index, pair in enumerate(self.pairs):
            for key in ("source", "destination"):
                if getattr(pair, key) not in ranks:
                    raise refused(f"must be a rank, 0 to {len(ranks) - 1}", field=("pairs", index, key), found=getattr(pair, key))
        given = {(pair.source, pair.destination) for pair in self.pairs}
        missing = next(((i, j) for i in ranks for j in ranks if i != j and (i, j) not in given), None)
        if len(ranks) < 2 or missing:
            problem = "expected every pair of two ranks or more, in both directions"
            raise refused(problem, field=("pairs",), found=f"no pair {missing}" if missing else f"{len(ranks)} ranks")
        return self


def read_measurement(path: Path) -> Measurement:
    """The file that `bench.link_probe` writes. Raises `ScaleMoEError` naming file and field; also when a pair is missing or cannot be
    fitted."""
    document = read_document(path)
    probe = document.parse(_Probe)
    pairs = {}
    for index, pair in enumerate(probe.pairs):
        try:
            fit = fit_alpha_beta(np.array(pair.bytes, dtype=np.float64), np.array(pair.time_us))
        except ScaleMoEError as error:
            problem = f"rank {pair.source} to rank {pair.destination}: {error.problem}"
            raise document.error(("pairs", index), problem, found=error.found, try_=error.try_) from error
        pairs[pair.source, pair.destination] = MeasuredPair(pair.source, pair.destination, tuple(pair.bytes), tuple(pair.time_us), fit)
    return Measurement(tuple(pairs[key] for key in sorted(pairs)), np.array(probe.node_of_rank, dtype=np.int64), probe.backend)


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
