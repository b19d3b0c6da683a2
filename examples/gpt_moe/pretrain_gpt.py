"""Train a GPT-MoE with Megatron-Core, with stock or ScaleMoE dispatch, on GPUs or on CPU ranks.

torchrun --nproc_per_node 2 -- examples/gpt_moe/pretrain_gpt.py --config examples/gpt_moe/quickstart.yaml --expert-model-parallel-size 2
"""

import os
import sys

import torch
from arguments import parse_args

from megatron_scalemoe.errors import ScaleMoEError
from megatron_scalemoe.integration import cpu_ranks


def main() -> int:
    try:
        args = parse_args()
        choose_device(args.device)
        from training import train  # after choose_device: it imports megatron.core

        train(args)
    except ScaleMoEError as error:
        print(f"[rank {os.environ.get('RANK', 0)}] error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def choose_device(device: str) -> None:
    """Bind this rank to its GPU, or make Megatron-Core run on the CPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ScaleMoEError("--device cuda needs a GPU", found="torch.cuda.is_available() is False", try_="--device cpu")
    if device == "cpu" and torch.cuda.is_available():
        raise ScaleMoEError("--device cpu is for machines without CUDA", found="a GPU", try_="CUDA_VISIBLE_DEVICES= to hide it")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        cpu_ranks.install()


if __name__ == "__main__":  # Megatron's checkpoint writer may import this file again
    sys.exit(main())
