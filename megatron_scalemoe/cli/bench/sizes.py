"""The options that the benchmarks of ranks and kernels share."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_scalemoe.typed import Options, refused


class LayerSizes(Options):
    """An MoE layer, and the seed of what it gets."""

    hidden: int = Field(default=1024, ge=1)
    """hidden size"""

    experts: int = Field(default=8, ge=1)
    """experts in all; a multiple of the ranks"""

    topk: int = Field(default=2, ge=1)
    """experts per token"""

    seed: int = Field(default=0, ge=0)
    """seed of tokens and routing"""

    @model_validator(mode="after")
    def _has_experts(self) -> LayerSizes:
        if self.topk > self.experts:
            raise refused("cannot exceed --experts", field=("topk",), found=f"--topk {self.topk} --experts {self.experts}")
        return self


class RankSizes(LayerSizes):
    """A layer over ranks of this machine."""

    ranks: int = Field(default=2, ge=1)
    """ranks on this machine = expert-parallel size"""

    timeout: float = Field(default=600, gt=0)
    """seconds after which all ranks are stopped"""

    @model_validator(mode="after")
    def _divides(self) -> RankSizes:
        if self.experts % self.ranks:
            raise refused("must be a multiple of --ranks", field=("experts",), found=f"--experts {self.experts} --ranks {self.ranks}")
        return self
