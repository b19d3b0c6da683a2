"""All in which the examples differ: the model, what a batch is made of, and the loss."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Spec = ModuleSpec | TransformerBlockSubmodules


@dataclasses.dataclass(frozen=True)
class Task:
    """What one example trains.

    layer_spec: stock Megatron's spec of the layers. Raises `ScaleMoEError` for flags that this model cannot have.
    model: this pipeline stage's model of such layers, ours or stock's.
    make_batch: bytes [micro batch, seq + 1] int64 and a seed for each of its sequences -> the tensors of a micro-batch, with `tokens`
        [micro batch, seq]; a `loss_mask` of that shape marks the tokens whose loss counts, all without one. The same for the same
        arguments, as sequences change ranks.
    forward: the model's loss per token [micro batch, seq], or the hidden states on all but the last pipeline stage.
    """

    layer_spec: Callable[[argparse.Namespace, TransformerConfig], Spec]
    model: Callable[[argparse.Namespace, TransformerConfig, Spec], nn.Module]
    make_batch: Callable[[Tensor, list[int]], dict[str, Tensor]]
    forward: Callable[[nn.Module, dict[str, Tensor]], Tensor]
