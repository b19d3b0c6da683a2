"""Train a BERT-MoE with Megatron-Core on masked language modelling, with stock or ScaleMoE dispatch, on GPUs or on CPU ranks.

torchrun --nproc_per_node 2 -- examples/bert_moe/pretrain_bert.py --config examples/common/stages.yaml --expert-model-parallel-size 2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

from pretrain import pretrain


def load_task():
    from bert import BERT

    return BERT


if __name__ == "__main__":  # Megatron's checkpoint writer may import this file again
    sys.exit(pretrain(load_task))
