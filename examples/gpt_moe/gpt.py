"""A GPT-MoE as any Megatron user builds one, on bytes: the next one is predicted from those before."""

from __future__ import annotations

import argparse

import torch
from data import NUM_BYTES
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from task import Spec, Task
from torch import Tensor, nn


def layer_spec(args: argparse.Namespace, config: TransformerConfig) -> Spec:
    use_te = args.transformer_impl == "transformer_engine"
    return get_gpt_decoder_block_spec(config, use_transformer_engine=use_te, normalization=args.normalization)


def model(args: argparse.Namespace, config: TransformerConfig, spec: Spec) -> nn.Module:
    return GPTModel(
        config,
        spec,
        vocab_size=NUM_BYTES,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )


def make_batch(window: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    return {"tokens": window[:, :-1].contiguous(), "labels": window[:, 1:].contiguous()}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens = batch["tokens"]
    position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    causal_mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
    return model(tokens, position_ids, causal_mask, labels=batch["labels"])


GPT = Task(layer_spec, model, make_batch, forward)
