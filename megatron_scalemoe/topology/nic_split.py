"""`NicSplit`: how traffic spreads over several NICs at the same distance: in proportion to their bandwidth, as NCCL gives them channels.

Even spreading, right for a switch's equal links, would make the slowest NIC of a node set the speed of all.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse

# Destinations at a time: the arrays of all links and all ranks are large.
_BLOCK = 128


@dataclasses.dataclass(frozen=True, eq=False)
class NicSplit:
    """M links between V positions, G destinations.

    sources, targets: int64 [M]. bandwidth_GBps: float64 [M].
    inside: bool [M], links with both ends in one node. enters, leaves: bool [M], links between nodes or to the fabric that end at a NIC,
        start at one. several: bool [G], whether a destination is reached through several NICs of its node: otherwise the fabric's choices
        are not NICs'.
    nics_GBps: float64 [V, G], what the NICs next on the ways from a position to a rank can take; 0 where none is.
    """

    sources: np.ndarray
    targets: np.ndarray
    bandwidth_GBps: np.ndarray
    inside: np.ndarray
    enters: np.ndarray
    leaves: np.ndarray
    several: np.ndarray
    nics_GBps: np.ndarray

    def shares(self, links: np.ndarray, even: np.ndarray) -> np.ndarray:
        """float64 [links, G]: the fraction of what is at a link's source that takes it. even: that where no NIC is next; 0 off routes."""
        total = self.nics_GBps[self.sources[links]]
        weight = np.where(even > 0, self._nics_beyond(links, slice(None)), 0.0)
        return np.where(total > 0, weight / np.where(total > 0, total, 1.0), even)

    def _nics_beyond(self, links: np.ndarray | slice, ranks: slice) -> np.ndarray:
        """float64 [links, ranks]: as `nics_GBps`, of what starts with each link."""
        bandwidth_L1, beyond = self.bandwidth_GBps[links][:, None], self.nics_GBps[self.targets[links], ranks]
        beyond = np.where(self.inside[links][:, None], np.minimum(bandwidth_L1, beyond), beyond)
        at_nic = self.leaves[links][:, None] | (self.enters[links][:, None] & self.several[ranks])
        return np.where(at_nic, bandwidth_L1, beyond)

    def _fill(self, on_route: np.ndarray) -> None:
        """From the destinations backwards, until nothing changes: as often as routes have links."""
        starts = sparse.csr_array((np.ones(self.sources.size), (self.sources, np.arange(self.sources.size))))
        starts.resize(len(self.nics_GBps), self.sources.size)
        for first in range(0, self.several.size, _BLOCK):
            ranks = slice(first, first + _BLOCK)
            while True:
                found = starts @ np.where(on_route[:, ranks], self._nics_beyond(slice(None), ranks), 0.0)
                if np.array_equal(found, self.nics_GBps[:, ranks]):
                    break
                self.nics_GBps[:, ranks] = found


def nic_split(
    sources: np.ndarray,
    targets: np.ndarray,
    on_route: np.ndarray,
    split: np.ndarray,
    bandwidth_GBps: np.ndarray,
    node_V: np.ndarray,
    is_nic_V: np.ndarray,
) -> NicSplit | None:
    """None where no position has a choice of NICs: as in most clusters, which have one beside each GPU. Arguments: see `Routes`."""
    apart = node_V[sources] != node_V[targets]
    enters, leaves = apart & is_nic_V[targets], apart & is_nic_V[sources]
    entry_nics = {nic: on_route[enters & (targets == nic)].any(axis=0) for nic in np.unique(targets[enters])}
    several = np.sum(list(entry_nics.values()), axis=0) > 1 if entry_nics else np.zeros(on_route.shape[1], dtype=bool)
    if not several.any() and not (leaves.any() and (split[node_V >= 0] < 1).any()):
        return None
    inside = ~apart & (node_V[sources] >= 0)
    found = NicSplit(sources, targets, bandwidth_GBps, inside, enters, leaves, several, np.zeros(split.shape))
    found._fill(on_route)
    return found
