#!/usr/bin/env bash
# Sets everything up and trains a small GPT-MoE with Megatron-Core and --moe-dispatcher scalemoe: on all GPUs, or on 2 CPU ranks.
#
#   bash tools/quickstart.sh [--train-iters 20 ...]    arguments go to the training script; they win over the quickstart's own
#   bash tools/quickstart.sh --help                    the training script's flags
#
# PYTHON=/path/to/python3.12 chooses the interpreter of a new .venv.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

EXAMPLE="$ROOT/examples/gpt_moe"
# Help and mistakes in the flags come from one process, not from every rank.
"$VENV_PYTHON" "$ROOT/examples/common/arguments.py" --config "$EXAMPLE/quickstart.yaml" "$@"
for argument in "$@"; do
    [[ "$argument" != "-h" && "$argument" != "--help" ]] || exit 0
done

# One rank per GPU. The expert-parallel size must divide both the ranks and quickstart.yaml's 8 experts; every rank has a micro-batch of 8.
read -r ranks expert_parallel batch threads < <("$VENV_PYTHON" -c '
import math, torch
from megatron_scalemoe.environment import usable_cores
ranks = torch.cuda.device_count() or 2
print(ranks, math.gcd(ranks, 8), max(16, 8 * ranks), max(1, usable_cores() // ranks))')
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

# The -- keeps torchrun from reading the training script's flags as abbreviations of its own.
exec "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$ranks" -- \
    "$EXAMPLE/pretrain_gpt.py" --config "$EXAMPLE/quickstart.yaml" \
    --expert-model-parallel-size "$expert_parallel" --global-batch-size "$batch" "$@"
