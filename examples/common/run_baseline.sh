#!/usr/bin/env bash
# Stage 1 of 4, the baseline: padded all-to-all in the manner of GShard and Tutel, every expert padded to the largest count.
#
#   [RANKS=2] [ITERS=200] bash examples/EXAMPLE/run_baseline.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

run_stage baseline --scalemoe-dispatch padded "${RECORDED[@]}" --scalemoe-trace-path "$LOGS/baseline" "$@"
