"""A BERT-MoE with Megatron-Core's BERT, on bytes: masked ones are predicted from those around. No next-sentence loss."""

from __future__ import annotations

import argparse
import copy

import torch
from data import NUM_BYTES
from megatron.core import parallel_state
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from task import Spec, Task
from torch import Tensor, nn

from megatron_scalemoe.errors import ScaleMoEError

MASK = NUM_BYTES  # the one token that is no byte
VOCAB_SIZE = NUM_BYTES + 1
# As in BERT: of the tokens to predict, these shares are masked and replaced by a random byte; the rest stays.
PREDICTED_SHARE, MASKED_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1


def layer_spec(args: argparse.Namespace, config: TransformerConfig) -> Spec:
    """Megatron's spec of BERT's layer, with MoE in place of its MLP. Raises `ScaleMoEError` for what Megatron's BERT cannot do."""
    if args.transformer_impl != "local":
        raise ScaleMoEError("pretrain_bert.py has no layers of Transformer Engine", found=args.transformer_impl, try_="local")
    if args.moe_layer_freq != 1:
        raise ScaleMoEError("all layers of Megatron's BERT are alike", found=f"--moe-layer-freq {args.moe_layer_freq}", try_="1")
    if config.sequence_parallel:
        raise ScaleMoEError(
            "Megatron's BERT head has no norm for sequence parallelism, which MoE needs with tensor parallelism",
            found=f"--tensor-model-parallel-size {args.tensor_model_parallel_size}",
            try_="--expert-model-parallel-size or --pipeline-model-parallel-size",
        )
    spec = copy.deepcopy(bert_layer_local_spec)
    if args.num_experts is not None:
        spec.submodules.mlp = get_moe_module_spec(use_te=False, num_experts=args.num_experts, moe_grouped_gemm=args.moe_grouped_gemm)
    return spec


def model(args: argparse.Namespace, config: TransformerConfig, spec: Spec) -> nn.Module:
    return BertModel(
        config,
        num_tokentypes=0,
        transformer_layer_spec=spec,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        add_binary_head=False,
    )


def make_batch(window: Tensor, seeds: list[int]) -> dict[str, Tensor]:
    """Equally many tokens of each sequence are to be predicted, so that the mean loss does not depend on how a batch is cut."""
    labels = window[:, :-1].contiguous()
    tokens, loss_mask = labels.clone(), torch.zeros(labels.shape)
    predicted = max(1, round(PREDICTED_SHARE * labels.shape[1]))
    for row, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(labels.shape[1], generator=generator)[:predicted]
        choice = torch.rand(predicted, generator=generator)
        random_bytes = torch.randint(NUM_BYTES, (predicted,), generator=generator)
        shown = torch.where(choice < MASKED_SHARE + RANDOM_SHARE, random_bytes, labels[row, places])
        tokens[row, places] = torch.where(choice < MASKED_SHARE, MASK, shown)
        loss_mask[row, places] = 1.0
    return {"tokens": tokens, "labels": labels, "loss_mask": loss_mask}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    no_padding = torch.ones_like(batch["tokens"])
    output = model(batch["tokens"], no_padding, lm_labels=batch["labels"])
    return output[0] if isinstance(output, tuple) else output  # the last pipeline stage has next-sentence logits, too: None here


BERT = Task(layer_spec, model, make_batch, forward)
