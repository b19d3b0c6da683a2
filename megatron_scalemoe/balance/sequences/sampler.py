"""A batch sampler that hands each global batch of another one to a sequence placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from megatron_scalemoe.balance.sequences.sequence_placement import SequencePlacement


class PlacedBatchSampler:
    """A batch sampler for `torch.utils.data.DataLoader` that yields the micro-batches of another one, reassigned between ranks.

    sampler: yields this data-parallel rank's micro-batches of sample ids, e.g. Megatron's `MegatronPretrainingSampler` or
        `MegatronPretrainingRandomSampler`; it alone knows how many samples were consumed, so a run resumed at the end of a global batch
        goes on with the same batches.
    placement: what decides, such as `LiveBalance.sequences`.
    tokens_of: int ids -> int [ids, S] token ids of the samples, e.g. `lambda ids: np.stack([dataset[i]["tokens"] for i in ids])`. Owners
        read each sample here once more than the data loader does.

    A last global batch that is not complete stays as it is. The number of micro-batches is fixed: no batch-size ramp-up. The DataLoader
    asks for batches ahead of training, from its main process; the collectives then run ahead, too, in the same order on all ranks. With
    pipeline stages take all micro-batches of a step from the DataLoader before its schedule starts (see `SequencePlacement.place`).
    """

    def __init__(self, sampler, placement: SequencePlacement, tokens_of: Callable[[list[int]], np.ndarray]):
        self.sampler, self.placement, self.tokens_of = sampler, placement, tokens_of

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        layout, waiting = self.placement.layout, []
        for micro_batch in self.sampler:
            waiting.append(list(micro_batch))
            if len(waiting) == layout.num_micro_batches:
                yield from self._placed(waiting)
                waiting = []
        yield from waiting

    def _placed(self, micro_batches: list[list[int]]) -> list[list[int]]:
        ids = [sample for micro_batch in micro_batches for sample in micro_batch]
        if len(ids) != self.placement.layout.sequences_per_rank:
            return micro_batches
        return self.placement.place(self.tokens_of(ids) if self.placement.owner else None, np.array(ids)).tolist()
