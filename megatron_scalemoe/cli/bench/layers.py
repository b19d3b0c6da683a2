"""The synthetic layers that the planner's benchmarks are run on, as their flags tell them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from megatron_scalemoe.typed import Options, refused

if TYPE_CHECKING:
    from megatron_scalemoe.topology.ports import Ports


class SyntheticLayers(Options):
    """Layers of synthetic traffic on equal nodes of equal ranks (`topology.ports.two_level_ports`)."""

    ranks: int = Field(default=8, ge=1)
    """ranks of the expert-parallel group"""

    nodes: int = Field(default=1, ge=1)
    """equal nodes that the ranks are spread over"""

    experts: int = Field(default=64, ge=1)
    """a multiple of --ranks"""

    topk: int = Field(default=2, ge=1)
    """experts per token"""

    replicas: int = Field(default=0, ge=0)
    """extra slots, in total over all ranks"""

    seeds: int = Field(default=5, ge=1)
    """layers, one for each seed from 0"""

    @model_validator(mode="after")
    def _divides(self) -> SyntheticLayers:
        if self.ranks % self.nodes:
            raise refused("must be a multiple of --nodes", field=("ranks",), found=f"--ranks {self.ranks} --nodes {self.nodes}")
        if self.experts % self.ranks:
            raise refused("must be a multiple of --ranks", field=("experts",), found=f"--experts {self.experts} --ranks {self.ranks}")
        return self

    def ports(self) -> Ports:
        from megatron_scalemoe.topology.ports import two_level_ports

        return two_level_ports(self.nodes, self.ranks // self.nodes)
