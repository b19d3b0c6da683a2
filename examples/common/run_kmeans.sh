#!/usr/bin/env bash
# Stage 3 of 4: + expert clustering: replicas of hot experts, replanned while training goes on, and each global batch's sequences placed
# on the ranks near the experts that their tokens choose.
#
#   [RANKS=2] [ITERS=200] [REPLICAS=8] bash examples/EXAMPLE/run_kmeans.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

run_stage kmeans "${BALANCE[@]}" "${RECORDED[@]}" --scalemoe-trace-path "$LOGS/kmeans" "$@"
