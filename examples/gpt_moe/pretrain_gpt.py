"""Train a GPT-MoE with Megatron-Core, with stock or ScaleMoE dispatch, on GPUs or on CPU ranks.

torchrun --nproc_per_node 2 -- examples/gpt_moe/pretrain_gpt.py --config examples/gpt_moe/quickstart.yaml --expert-model-parallel-size 2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

from pretrain import pretrain


def load_task():
    from gpt import GPT

    return GPT


if __name__ == "__main__":  # Megatron's checkpoint writer may import this file again
    sys.exit(pretrain(load_task))
