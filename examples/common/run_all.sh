#!/usr/bin/env bash
# All four stages one after the other, then stock Megatron: the same model, data, seed and first checkpoint. Stock runs twice, the second time with every
# batch in smaller micro-batches, which shows how far rounding alone takes the loss. Prints a table of speed, loss and balance, and writes
# $LOGS/report.html with the curves.
#
#   [RANKS=2] [ITERS=200] [REPLICAS=8] [TOPOLOGY=cluster.yaml] bash examples/EXAMPLE/run_all.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

for argument in "$@"; do
    [[ "$argument" != --scalemoe-* && "$argument" != --moe-dispatcher* ]] ||
        die "$argument would make the stages something else" "try:   REPLICAS and TOPOLOGY, or one stage: run_ga.sh $argument"
done
for stage in baseline adaptive kmeans ga; do
    bash "$COMMON/run_$stage.sh" "$@"
done
run_stage stock --moe-dispatcher stock "$@"
run_stage stock_rounding --moe-dispatcher stock --micro-batch-size "$((16 / RANKS))" "$@"

# The report shows what lies directly in its directory, beside the runs: here the last stage's network, routing, plan and comparison.
cp "$LOGS"/ga/{routing.npz,plan.json,compare.json} "$LOGS/"
"${SCALEMOE[@]}" report "$LOGS" --quiet --force -o "$LOGS/report.html"
