"""`Routes`: which links the traffic between two ranks uses, and what that makes of latency, bandwidth and the links' load.

Shortest paths by latency, then by number of hops. Where several are equally short, a vertex splits its flow equally over its next hops
(equal-cost multipath, as ECMP hashing does on average), but over NICs by their bandwidth (`nic_split`). Everything is computed for all
destinations at once: flows move from hop to hop as an array [vertices, ranks], so that 1,024 GPUs take seconds.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.topology.graph import Topology
from megatron_scalemoe.topology.nic_split import NicSplit, nic_split

# Lengths are whole numbers, so that equally long paths compare equal: latency in units of 0.1 ns, and the hops below it.
_UNITS_PER_US = 10_000
_HOPS = 4096
MAX_INCIDENCE_RANKS = 128
# Up to here one product with the incidence, kept, is ten times faster than following the flow.
_MATRIX_PAYS_RANKS = 64
MAX_RANKS = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """Routes between G ranks over M links. V positions: a GPU that forwards nothing has two, one where it sends, one where it receives.

    latency_us: float64 [G, G], from row to column; 0 on the diagonal.
    sources, targets: int64 [M], the position where each link starts and ends.
    sends_at, receives_at: int64 [G], the positions where each rank's traffic starts and ends.
    on_route: bool [M, G], whether the link lies on a shortest path to the rank.
    split: float64 [V, G], 1 / (number of next hops from the position to the rank).
    nics: how flows split over NICs instead, where there is a choice of them.
    link_bandwidth_GBps, link_latency_us: float64 [M].
    node_V: int64 [V], the node of each position, -1 in the fabric. is_nic_V: bool [V].
    """

    latency_us: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    sends_at: np.ndarray
    receives_at: np.ndarray
    on_route: np.ndarray
    split: np.ndarray
    nics: NicSplit | None
    link_bandwidth_GBps: np.ndarray
    link_latency_us: np.ndarray
    node_V: np.ndarray
    is_nic_V: np.ndarray

    @property
    def num_ranks(self) -> int:
        return self.latency_us.shape[0]

    def link_load(self, bytes_GG: np.ndarray) -> np.ndarray:
        """float64 [M]: what each link carries of `bytes_GG` [G, G] (row sends to column; the diagonal stays where it is). A batch
        [..., G, G] gives [..., M]."""
        if self.num_ranks <= _MATRIX_PAYS_RANKS:
            load_MB = self._incidence_MX @ bytes_GG.reshape(-1, self.num_ranks**2).T
            return load_MB.T.reshape(*bytes_GG.shape[:-2], self.sources.size)
        if bytes_GG.ndim > 2:
            loads = [self.link_load(matrix) for matrix in bytes_GG.reshape(-1, *bytes_GG.shape[-2:])]
            return np.reshape(loads, (*bytes_GG.shape[:-2], -1))
        load_M = np.zeros(self.sources.size)
        for links, flow in self._waves(self._at_sources(bytes_GG)):
            load_M[links] += flow.sum(axis=1)
        return load_M

    @functools.cached_property
    def _incidence_MX(self) -> sparse.csr_array:
        return self.incidence().T.tocsr()

    def link_flow(self, bytes_GG: np.ndarray) -> np.ndarray:
        """float64 [M, G]: as `link_load`, for each destination apart."""
        return self._link_flow(self._at_sources(bytes_GG))

    def incidence(self) -> sparse.csr_array:
        """float64 [G * G, M]: the fraction of the traffic from rank i to rank j (row i * G + j) on each link.

        Raises `ScaleMoEError` above 128 ranks, where it would take gigabytes: `link_load` needs no such matrix.
        """
        ranks = self.num_ranks
        if ranks > MAX_INCIDENCE_RANKS:
            problem = f"the incidence of all rank pairs and links is for up to {MAX_INCIDENCE_RANKS} ranks"
            raise ScaleMoEError(problem, found=f"{ranks} ranks", try_="Routes.link_load")
        rows = []
        for rank in range(ranks):
            unit_GG = np.zeros((ranks, ranks))
            unit_GG[rank] = 1
            rows.append(sparse.csr_array(self.link_flow(unit_GG).T))
        return sparse.vstack(rows, format="csr")

    @functools.cached_property
    def bandwidth_GBps(self) -> np.ndarray:
        """float64 [G, G]: the rate at which the pair, alone, saturates a link; `inf` on the diagonal. Takes long for tori of hundreds."""
        ranks = np.arange(self.num_ranks)
        next_link_VG = np.full(self.split.shape, -1)
        links, destinations = np.nonzero(self.on_route)
        next_link_VG[self.sources[links], destinations] = links
        positions_GG = np.repeat(self.sends_at[:, None], ranks.size, axis=1)
        bandwidth_GG = np.full(positions_GG.shape, np.inf)
        while True:  # along the way as long as there is one next hop
            links_GG = np.where(self.split[positions_GG, ranks] == 1, next_link_VG[positions_GG, ranks], -1)
            np.fill_diagonal(links_GG, -1)
            moving = links_GG >= 0
            if not moving.any():
                break
            bandwidth_GG[moving] = np.minimum(bandwidth_GG[moving], self.link_bandwidth_GBps[links_GG[moving]])
            positions_GG[moving] = self.targets[links_GG[moving]]
        # Where a flow splits it may merge again further on, so that it must be followed.
        for position in np.unique(positions_GG[self.split[positions_GG, ranks] < 1]):
            beyond_G = self._bandwidth_from_position(position)
            bandwidth_GG = np.where(positions_GG == position, np.minimum(bandwidth_GG, beyond_G), bandwidth_GG)
        np.fill_diagonal(bandwidth_GG, np.inf)
        return bandwidth_GG

    def bandwidth_from(self, rank: int) -> np.ndarray:
        """float64 [G]: one row of `bandwidth_GBps`, without computing the others."""
        bandwidth_G = self._bandwidth_from_position(self.sends_at[rank])
        bandwidth_G[rank] = np.inf
        return bandwidth_G

    def _bandwidth_from_position(self, position: int) -> np.ndarray:
        start_VG = np.zeros(self.split.shape)
        start_VG[position] = 1
        flow_MG = self._link_flow(start_VG)
        with np.errstate(divide="ignore"):  # destinations that nothing flows to
            return 1 / (flow_MG / self.link_bandwidth_GBps[:, None]).max(axis=0)

    def _at_sources(self, bytes_GG: np.ndarray) -> np.ndarray:
        start_VG = np.zeros(self.split.shape)
        start_VG[self.sends_at] = bytes_GG
        start_VG[self.sends_at, np.arange(self.num_ranks)] = 0
        return start_VG

    def _link_flow(self, start_VG: np.ndarray) -> np.ndarray:
        flow_MG = np.zeros(self.on_route.shape)
        for links, flow in self._waves(start_VG):
            flow_MG[links] += flow
        return flow_MG

    def _waves(self, start_VG: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Moves flow hop by hop until all has arrived. Yields for each hop the links that may carry some, and their flow [links, G]."""
        positions = np.flatnonzero(start_VG.any(axis=1))
        at_positions = start_VG[positions]
        row_of_V = np.empty(len(start_VG), dtype=np.int64)
        while positions.size:
            row_of_V.fill(-1)
            row_of_V[positions] = np.arange(positions.size)
            links = np.flatnonzero(row_of_V[self.sources] >= 0)
            if self.nics is None:
                flow = (at_positions * self.split[positions])[row_of_V[self.sources[links]]]
                flow *= self.on_route[links]
            else:
                even = self.split[self.sources[links]] * self.on_route[links]
                flow = at_positions[row_of_V[self.sources[links]]] * self.nics.shares(links, even)
            used = flow.any(axis=1)
            links, flow = links[used], flow[used]
            yield links, flow
            positions, rows = np.unique(self.targets[links], return_inverse=True)
            arrive = sparse.csr_array((np.ones(links.size), (rows, np.arange(links.size))), (positions.size, links.size))
            at_positions = arrive @ flow


def compute_routes(topology: Topology) -> Routes:
    """Routes between all ranks of the topology, which `Topology.build` has found to be connected.

    Raises `ScaleMoEError` above 4096 ranks, where the arrays would take many gigabytes.
    """
    if topology.num_ranks > MAX_RANKS:
        raise ScaleMoEError(f"routes are for up to {MAX_RANKS} ranks", found=topology.num_ranks, try_="Topology.subset")
    index = {name: i for i, name in enumerate(topology.graph)}
    receives_at = np.array([index[name] for name in topology.ranks])
    sends_at = receives_at.copy()
    in_two_places = [rank for rank, name in enumerate(topology.ranks) if name in topology.endpoints]
    sends_at[in_two_places] = len(index) + np.arange(len(in_two_places))
    sends = dict(zip(topology.ranks, sends_at, strict=True))
    node_V = np.array([-1 if v.node is None else v.node for v in topology.vertices])
    return _shortest_routes(
        sources=np.array([sends.get(u, index[u]) for u, _ in topology.links], dtype=np.int64),
        targets=np.array([index[v] for _, v in topology.links], dtype=np.int64),
        sends_at=sends_at,
        receives_at=receives_at,
        link_bandwidth_GBps=topology.bandwidth_GBps,
        link_latency_us=topology.latency_us,
        node_V=np.concatenate([node_V, topology.node_of_rank[in_two_places]]),
        is_nic_V=np.array([v.kind == "nic" for v in topology.vertices] + [False] * len(in_two_places)),
    )


def backwards(routes: Routes) -> Routes:
    """Routes over the same links in the opposite direction. From destination to source it uses the links that `routes` uses from source
    to destination, though flow splits elsewhere: so it tells which links all traffic *of* a rank passes."""
    return _shortest_routes(
        sources=routes.targets,
        targets=routes.sources,
        sends_at=routes.receives_at,
        receives_at=routes.sends_at,
        link_bandwidth_GBps=routes.link_bandwidth_GBps,
        link_latency_us=routes.link_latency_us,
        node_V=routes.node_V,
        is_nic_V=routes.is_nic_V,
    )


def _shortest_routes(*, sources: np.ndarray, targets: np.ndarray, receives_at: np.ndarray, **fields: np.ndarray) -> Routes:
    positions = fields["node_V"].size
    length_M = np.rint(fields["link_latency_us"] * _UNITS_PER_US) * _HOPS + 1
    reverse = sparse.csr_array((length_M, (targets, sources)), (positions, positions))
    length_VG = np.ascontiguousarray(csgraph.dijkstra(reverse, indices=receives_at).T)
    on_route = np.empty((sources.size, receives_at.size), dtype=bool)
    for block in np.array_split(np.arange(sources.size), sources.size // 1024 + 1):  # in blocks: these arrays are large
        beyond = length_VG[targets[block]]
        on_route[block] = (length_VG[sources[block]] == length_M[block, None] + beyond) & np.isfinite(beyond)
    starts = sparse.csr_array((np.ones(sources.size), (sources, np.arange(sources.size))), (positions, sources.size))
    latency_GG = np.floor(length_VG[fields["sends_at"]] / _HOPS) / _UNITS_PER_US
    np.fill_diagonal(latency_GG, 0)
    split = 1 / np.maximum(starts @ on_route.astype(np.uint16), 1)
    return Routes(
        latency_us=latency_GG,
        sources=sources,
        targets=targets,
        receives_at=receives_at,
        on_route=on_route,
        split=split,
        nics=nic_split(sources, targets, on_route, split, fields["link_bandwidth_GBps"], fields["node_V"], fields["is_nic_V"]),
        **fields,
    )
