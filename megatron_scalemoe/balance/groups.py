"""The process groups that live balance works in. Who knows the model hands them in: `mcore/live_model.py` those of Megatron."""

from __future__ import annotations

import dataclasses

from torch.distributed import ProcessGroup


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups of this rank.

    world: all ranks of the job. stage: of its pipeline stage. pp: of its pipeline, a rank of each stage. ep: ranks that share out the
    experts of a layer. expert_tp: ranks that share each expert. tp, cp, dp: tensor, context and data parallelism of the other layers.
    """

    world: ProcessGroup
    stage: ProcessGroup
    pp: ProcessGroup
    ep: ProcessGroup
    expert_tp: ProcessGroup
    tp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup

    @property
    def speaks_for_data(self) -> bool:
        """True on one rank of each data-parallel rank."""
        return self.tp.rank() == self.cp.rank() == self.pp.rank() == 0
