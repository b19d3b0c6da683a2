"""A local (no Transformer Engine, no Apex) norm that works with sequence parallelism, which MoE training with TP > 1 requires.

Under sequence parallelism every tensor-parallel rank normalises its own part of the sequence, so that the gradient of a norm's parameters
is the sum over these ranks. Megatron's `finalize_model_grads` adds them up for every parameter marked `sequence_parallel`; its
`WrappedTorchNorm` does not mark them and refuses instead. This one is the same torch module with the mark, so that checkpoint keys do not
change.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe.errors import ScaleMoEError

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class SequenceParallelNorm:
    """Builds torch's `LayerNorm` or `RMSNorm` (by `config.normalization`) with parameters marked for sequence parallelism.

    Raises `ScaleMoEError` for a norm that torch does not have.
    """

    # A class because Megatron's build_module() calls classes but passes functions through.
    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        if config.normalization not in _NORMS or config.layernorm_zero_centered_gamma:
            raise ScaleMoEError(
                f"the local norm is one of {', '.join(_NORMS)}, without --apply-layernorm-1p",
                found=f"{config.normalization}, layernorm_zero_centered_gamma={config.layernorm_zero_centered_gamma}",
                try_="install Transformer Engine and use its layer spec",
            )
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def with_sequence_parallel_norm(spec: Any) -> Any:
    """A copy of a Megatron spec (layer, block, submodules) in which every `WrappedTorchNorm` is a `SequenceParallelNorm`."""
    if spec is WrappedTorchNorm:
        return SequenceParallelNorm
    if isinstance(spec, (list, tuple)):
        return type(spec)(with_sequence_parallel_norm(item) for item in spec)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        changes = {field.name: with_sequence_parallel_norm(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
        return dataclasses.replace(spec, **changes)
    return spec
