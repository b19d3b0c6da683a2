"""`CostModel`: the constants of one MoE layer and its accelerator that turn rows into microseconds."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_scalemoe.typed import Options


class CostModel(Options):
    """One MoE layer in training. All times are of one micro-batch, forward and backward. Raises `ScaleMoEError` on a value out of range."""

    hidden_size: int = Field(default=4096, ge=1)
    """numbers in a token's row; not given: the trace's, if it has it"""

    ffn_hidden_size: int = Field(default=1536, ge=1)
    """inner width of one expert; not given: the trace's, if it has it"""

    gated: bool = True
    """experts of three matrices, SwiGLU, or of two"""

    bytes_per_value: int = Field(default=2, ge=1)
    """of a row and of a parameter, 2 for bf16"""

    gpu_TFLOPs: float = Field(default=400.0, gt=0)
    """what a rank reaches in the experts' matrix products, 10^12 floating-point operations a second"""

    micro_batches: int = Field(default=1, ge=1)
    """per optimizer step: replicas receive parameters and return gradients once for all of them"""

    exchange: Literal["flat", "1dh", "2dh"] = "flat"
    """every rank to every rank; through one leader per node (Hetu); or inside the nodes, then between ranks of equal local number (Tutel,
    DeepSpeed)"""

    deduplicate: bool = True
    """one row per (token, destination rank), as our dispatcher sends, or one per (token, expert), as Megatron's alltoall"""

    overlap: float = Field(default=0.0, ge=0, le=1)
    """share of the shorter of communication and compute that hides behind the other, 0 (none) to 1 (all)"""

    exchange_overhead_us: float = Field(default=0.0, ge=0)
    """fixed time of one exchange (of each of its phases with 1dh and 2dh) beside the links' latency: launches, counts, synchronisation"""

    @property
    def row_bytes(self) -> int:
        return self.hidden_size * self.bytes_per_value

    @property
    def expert_parameters(self) -> int:
        return (3 if self.gated else 2) * self.hidden_size * self.ffn_hidden_size

    @property
    def expert_bytes(self) -> int:
        return self.expert_parameters * self.bytes_per_value

    @property
    def compute_us_per_row(self) -> float:
        """Forward (2 operations per parameter) and backward (4)."""
        return 6 * self.expert_parameters / (self.gpu_TFLOPs * 1e6)

    def layer_us(self, communication_us: float, compute_us: float) -> float:
        """Both together, after overlap."""
        return communication_us + compute_us - self.overlap * min(communication_us, compute_us)
