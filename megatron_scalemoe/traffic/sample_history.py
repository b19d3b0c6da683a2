"""`SampleHistory`: the experts that each sample's tokens chose when it was last computed here, for data that comes again (epochs).

ScaleMoE's own predictor: the previous epoch's choices of the same sample, by its id. It keeps counts per sequence, layer and expert instead
of every token's choice: 2 bytes each, for the ranks' scores are sums over tokens.
"""

from __future__ import annotations

import numpy as np

from megatron_scalemoe.plan.placement_plan import PlacementPlan
from megatron_scalemoe.traffic.affinity import stacked_hosts

_MAX_BYTES = 2**30


class SampleHistory:
    """Owns the counts of the samples recorded last, as many as fit into `max_bytes`; the oldest make room.

    A rank records what it routed itself: its slice of a sequence, the layers of its pipeline stage. `hosted` is a sum over tokens and
    layers, so the sum over ranks is that of the whole sequence.
    """

    def __init__(self, num_layers: int, num_experts: int, *, max_bytes: int = _MAX_BYTES):
        capacity = max_bytes // (2 * num_layers * num_experts)
        assert capacity > 0, "max_bytes holds no sample"
        self._counts = np.zeros((capacity, num_layers, num_experts), dtype=np.uint16)  # the system gives the memory as it is filled
        self._id_of_row: list[int] = []
        self._row_of_id: dict[int, int] = {}
        self._oldest = 0

    def __len__(self) -> int:
        return len(self._row_of_id)

    def record(self, ids_B: np.ndarray, counts_BLE: np.ndarray) -> None:
        """Remembers int [B, L, E] counts, at most 65535 each, in place of what was known of these samples."""
        for sample, counts_LE in zip(ids_B.tolist(), np.minimum(counts_BLE, np.iinfo(np.uint16).max), strict=True):
            self._counts[self._row(sample)] = counts_LE

    def _row(self, sample: int) -> int:
        if sample in self._row_of_id:
            return self._row_of_id[sample]
        if len(self._id_of_row) < len(self._counts):
            row = len(self._id_of_row)
            self._id_of_row.append(sample)
        else:
            row, self._oldest = self._oldest, (self._oldest + 1) % len(self._counts)
            del self._row_of_id[self._id_of_row[row]]
            self._id_of_row[row] = sample
        self._row_of_id[sample] = row
        return row

    def hosted(self, ids_B: np.ndarray, plan: PlacementPlan) -> np.ndarray:
        """int64 [B, 1 + G]: recorded selections of each sample, and how many of them each rank hosts; 0 for samples not seen here."""
        assert self._counts.shape[1:] == (plan.num_layers, plan.num_logical_experts), "history and plan are of different models"
        hosted_BX = np.zeros((len(ids_B), 1 + plan.num_ranks), dtype=np.int64)
        seen = [(i, self._row_of_id[sample]) for i, sample in enumerate(ids_B.tolist()) if sample in self._row_of_id]
        if seen:
            index, row = np.array(seen).T
            counts_XF = self._counts[row].reshape(len(row), -1).astype(np.float64)
            hosted_BX[index, 0] = counts_XF.sum(axis=1)
            hosted_BX[index, 1:] = counts_XF @ stacked_hosts(plan).reshape(-1, plan.num_ranks)
        return hosted_BX
