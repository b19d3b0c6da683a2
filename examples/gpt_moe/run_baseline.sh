#!/usr/bin/env bash
# Stage 1 of 4, the baseline: padded all-to-all in the manner of GShard and Tutel, every expert padded to the largest count.
#
#   [RANKS=2] [ITERS=200] bash examples/gpt_moe/run_baseline.sh [flags of pretrain_gpt.py ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

run_stage baseline --scalemoe-dispatch padded "${COMMON[@]}" --scalemoe-trace-path "$LOGS/baseline" "$@"
