#!/usr/bin/env bash
# Stage 4 of 4: + topology-aware remapping: homes of experts move between ranks, too, where that pays back on the measured network. Then
# explores what every solver would do with the recorded routing: compare.json, and plan.json, the plan that was in force at the end.
#
#   [RANKS=2] [ITERS=200] [REPLICAS=8] [TOPOLOGY=cluster.yaml] bash examples/EXAMPLE/run_ga.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

folder="$LOGS/ga"
topology="$LOGS/topology.yaml" # not in the stage's folder, which is replaced
mkdir -p "$LOGS"
if [[ -z "${TOPOLOGY:-}" ]]; then
    measure_topology "$topology"
elif [[ ! "$TOPOLOGY" -ef "$topology" ]]; then
    cp "$TOPOLOGY" "$topology"
fi
run_stage ga "${BALANCE[@]}" --scalemoe-migrate --scalemoe-topology "$topology" "${RECORDED[@]}" --scalemoe-trace-path "$folder" "$@"
cp "$topology" "$folder/topology.yaml"
plans=("$folder"/checkpoints/iter_*/scalemoe_plan.json)
cp "${plans[-1]}" "$folder/plan.json"
explore "$folder"
