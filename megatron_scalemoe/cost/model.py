"""`CostModel`: the constants of one MoE layer and its accelerator that turn rows into microseconds."""

from __future__ import annotations

import dataclasses
import math

from megatron_scalemoe.errors import ScaleMoEError

EXCHANGES = ("flat", "1dh", "2dh")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """One MoE layer in training. All times are of one micro-batch, forward and backward. Raises `ScaleMoEError` on a value out of range."""

    hidden_size: int = 4096
    """Numbers in a token's row."""

    ffn_hidden_size: int = 1536
    """Inner width of one expert."""

    gated: bool = True
    """SwiGLU experts (three matrices) rather than two matrices."""

    bytes_per_value: int = 2
    """Of a row and of a parameter: 2 for bf16."""

    gpu_TFLOPs: float = 400.0
    """What one rank reaches in the experts' matrix products (10^12 floating-point operations a second)."""

    micro_batches: int = 1
    """Per optimizer step: replicas receive parameters and return gradients once for all of them."""

    exchange: str = "flat"
    """`flat`: every rank to every rank. `1dh`: through one leader per node (Hetu). `2dh`: inside the nodes, then between ranks of equal
    local number (Tutel, DeepSpeed)."""

    deduplicate: bool = True
    """One row per (token, destination rank), as our dispatcher sends; False: one per (token, expert), as Megatron's alltoall."""

    overlap: float = 0.0
    """Share of the shorter of communication and compute that hides behind the other, 0 (none) to 1 (all)."""

    exchange_overhead_us: float = 0.0
    """Fixed time of one exchange (of each of its phases with `1dh` and `2dh`) beside the links' latency: launches, counts,
    synchronisation."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "ffn_hidden_size", "bytes_per_value", "micro_batches"):
            if getattr(self, name) < 1:
                raise ScaleMoEError(f"{name} must be 1 or more", found=getattr(self, name))
        if not (math.isfinite(self.gpu_TFLOPs) and self.gpu_TFLOPs > 0):
            raise ScaleMoEError("gpu_TFLOPs must be above 0", found=self.gpu_TFLOPs)
        if not (math.isfinite(self.exchange_overhead_us) and self.exchange_overhead_us >= 0):
            raise ScaleMoEError("exchange_overhead_us must be 0 or more", found=self.exchange_overhead_us)
        if not 0 <= self.overlap <= 1:
            raise ScaleMoEError("overlap must be from 0 to 1", found=self.overlap)
        if self.exchange not in EXCHANGES:
            raise ScaleMoEError(f"exchange must be one of {', '.join(EXCHANGES)}", found=repr(self.exchange))

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
