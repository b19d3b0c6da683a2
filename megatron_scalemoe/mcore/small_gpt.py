"""A small GPT-MoE with skewed routing that trains, by stock Megatron or by ours: what `scalemoe bench live` compares."""

from __future__ import annotations

import argparse
import functools
import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scalemoe.config import ScaleMoEConfig
from megatron_scalemoe.mcore.specs import use_scalemoe

VOCABULARY = 512
# At 1e-3 a change of 1e-6 in the weights of stock Megatron moves its loss by 1e-2 in 60 steps; at this rate by 1e-6: comparable.
LEARNING_RATE = 3e-4
_HEAD_SIZE, _LARGEST_STRIDE = 64, 4
# Standard deviation of the Gumbel distribution: log p plus such noise, the largest k chosen, draws k experts by p.
_GUMBEL_STD = math.pi / math.sqrt(6)


class SmallGPTTraining:
    """Model and optimizer of one run. Every run with the same arguments starts with the same weights and sees the same tokens.

    scalemoe: None for stock Megatron (alltoall, SequentialMLP).
    """

    def __init__(self, args: argparse.Namespace, scalemoe: ScaleMoEConfig | None):
        self._args = args
        torch.manual_seed(args.seed)
        model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
        self.config = _config(args)
        spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False)
        if scalemoe is not None:
            spec = use_scalemoe(spec, scalemoe)
        model = GPTModel(self.config, spec, VOCABULARY, args.seq, position_embedding_type="rope").to(torch.cuda.current_device())
        self.moe_layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        for number, layer in enumerate(self.moe_layers):
            _skew(layer.router, args.zipf, 1000 * args.seed + number)
        self.model = DistributedDataParallel(self.config, DistributedDataParallelConfig(), model)
        optimizer = OptimizerConfig(optimizer="adam", lr=LEARNING_RATE, min_lr=LEARNING_RATE, weight_decay=0.01, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=torch.cuda.is_available())

    def step(self, iteration: int) -> Tensor:
        """One optimizer step; this rank's mean loss, a scalar."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_micro_batches(self._args, iteration),
            model=[self.model],
            num_microbatches=self._args.micro_batches,
            seq_length=self._args.seq,
            micro_batch_size=self._args.micro_batch,
            forward_only=False,
        )
        self.optimizer.step()
        return torch.stack([part["loss"] for part in losses]).mean()


def _config(args: argparse.Namespace) -> TransformerConfig:
    return TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=max(1, args.hidden // _HEAD_SIZE),
        ffn_hidden_size=args.ffn,
        moe_ffn_hidden_size=args.ffn,
        num_moe_experts=args.experts,
        moe_router_topk=args.topk,
        moe_router_pre_softmax=args.topk == 1,  # top-1 needs it
        moe_router_load_balancing_type="none",  # the skew is the point
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=args.ranks,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def _skew(router: torch.nn.Module, zipf: float, seed: int) -> None:
    """Adds -zipf log(r) to the logits of the expert of popularity r = 1, 2, ... (in a random order), whose own part is first scaled to the
    spread at which the largest k are about draws from that Zipf law. Which experts a token gets is still the model's own affair."""
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.randperm(router.config.num_moe_experts, generator=generator) + 1
    bias_E = (-zipf * popularity_E.log()).to(torch.cuda.current_device())
    # normalised inputs times weights of the initial spread
    scale = _GUMBEL_STD / (router.config.init_method_std * math.sqrt(router.config.hidden_size))
    router.gating = functools.partial(_skewed, router.gating, scale, bias_E)


def _skewed(gating, scale: float, bias_E: Tensor, x: Tensor) -> Tensor:
    return gating(x) * scale + bias_E


def _micro_batches(args: argparse.Namespace, iteration: int):
    """This rank's micro-batches of a step, [micro_batch, seq + 1] tokens each: walks over the vocabulary, each with a stride of its own."""
    samples = args.ranks * args.micro_batches * args.micro_batch
    generator = torch.Generator().manual_seed(args.seed * 100_003 + iteration)
    start = torch.randint(0, VOCABULARY, (samples, 1), generator=generator)
    stride = torch.randint(1, _LARGEST_STRIDE + 1, (samples, 1), generator=generator)
    tokens = (start + stride * torch.arange(args.seq + 1)) % VOCABULARY
    mine = tokens.chunk(args.ranks)[torch.distributed.get_rank()]  # all are data-parallel
    return iter(mine.to(torch.cuda.current_device()).chunk(args.micro_batches))


def _forward_step(micro_batches, model):
    tokens = next(micro_batches)
    sequence = tokens.shape[1] - 1
    positions = torch.arange(sequence, device=tokens.device).expand(len(tokens), -1)
    causal_mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool, device=tokens.device).triu(1)
    output = model(tokens[:, :-1].contiguous(), positions, causal_mask, labels=tokens[:, 1:].contiguous())
    return output, _mean_loss


def _mean_loss(output: Tensor):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place
