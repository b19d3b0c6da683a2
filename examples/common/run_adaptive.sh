#!/usr/bin/env bash
# Stage 2 of 4: adaptive all-to-all, one row per token and destination rank, no padding.
#
#   [RANKS=2] [ITERS=200] bash examples/EXAMPLE/run_adaptive.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

run_stage adaptive "${RECORDED[@]}" --scalemoe-trace-path "$LOGS/adaptive" "$@"
