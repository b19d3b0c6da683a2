"""ScaleMoE in a Megatron-Core script of your own, as short as it gets: builds a GPT with MoE layers and takes three steps.

torchrun --standalone --nproc_per_node 2 examples/minimal.py                          stock Megatron
torchrun --standalone --nproc_per_node 2 examples/minimal.py --moe-dispatcher scalemoe    the same losses
"""

import argparse
import os

import torch

from megatron_scalemoe.mcore import cpu_ranks

if not torch.cuda.is_available():
    cpu_ranks.install()  # before megatron.core is imported, and `use_scalemoe`, which imports it: they bind torch.cuda's names

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scalemoe import add_scalemoe_args, scalemoe_config_from_args, use_scalemoe

VOCABULARY, LENGTH, BATCH = 128, 16, 4


def main() -> None:
    args = add_scalemoe_args(argparse.ArgumentParser()).parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",  # ScaleMoE takes its place; Megatron's own default is allgather
        expert_model_parallel_size=ranks,
        add_bias_linear=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    scalemoe = scalemoe_config_from_args(args)
    if scalemoe is not None:  # None: stock Megatron, nothing of ours in the model
        spec = use_scalemoe(spec, scalemoe)
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").to(torch.cuda.current_device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator).to(torch.cuda.current_device())
        positions = torch.arange(LENGTH, device=tokens.device).expand(BATCH, LENGTH)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # every rank has the same tokens: without DDP its gradients of shared parameters are the same, too
        if torch.distributed.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.6f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
