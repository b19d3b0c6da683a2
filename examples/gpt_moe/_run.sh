# Sourced by run_*.sh: a stage is one training run of stages.yaml's model, with its log and all it records in $LOGS/<stage>.
# shellcheck shell=bash disable=SC2034

EXAMPLE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

# The comment at the top of the script is its help.
for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0"
        cat <<'HELP'

RANKS=N      CPU ranks or GPUs, all one expert-parallel group: 2, 4, 8 or 16 (default: 4, or 2 with fewer than 4 cores)
ITERS=N      iterations (default 200)
LOGS=FOLDER  where the stages have their folders (default logs/gpt_moe); a stage that is run again replaces its folder
REPLICAS=N   run_kmeans.sh and run_ga.sh: slots per layer for copies of hot experts, over all ranks (default 8)
TOPOLOGY=F   run_ga.sh: the cluster (default: measured on this machine)

Other arguments go to the training script and win over stages.yaml; its flags: python examples/gpt_moe/arguments.py --help
HELP
        exit 0
    fi
done

source "$EXAMPLE/../../tools/_venv.sh"
SCALEMOE=("$VENV_PYTHON" -m megatron_scalemoe.cli.main)
cores="$("$VENV_PYTHON" -c 'from megatron_scalemoe.environment import usable_cores; print(usable_cores())')"
RANKS="${RANKS:-$((cores < 4 ? 2 : 4))}"
ITERS="${ITERS:-200}"
LOGS="${LOGS:-logs/gpt_moe}"
REPLICAS="${REPLICAS:-8}"

check_settings() {
    local argument
    [[ "$RANKS" =~ ^(2|4|8|16)$ ]] || die "RANKS must be 2, 4, 8 or 16: they share 16 experts and 32 sequences" "found: $RANKS"
    [[ "$ITERS" =~ ^[1-9][0-9]*$ ]] || die "ITERS must be a number of iterations, 1 or more" "found: $ITERS"
    [[ "$REPLICAS" =~ ^[0-9]+$ && $((REPLICAS % RANKS)) == 0 ]] ||
        die "REPLICAS must be a multiple of the ranks" "found: $REPLICAS for $RANKS ranks"
    [[ -z "${TOPOLOGY:-}" || -f "$TOPOLOGY" ]] || die "TOPOLOGY names no file" "found: $TOPOLOGY" "try:   scalemoe topology measure -o FILE"
    for argument in "$@"; do
        case "$argument" in
            --run-name* | --results-dir* | --scalemoe-trace-path*) die "$argument is the stage's own" "try:   LOGS=folder bash $0" ;;
            --load* | --save | --save=*) die "a stage starts afresh, in its own folder" "found: $argument" "try:   pretrain_gpt.py itself" ;;
        esac
    done
}
check_settings "$@"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"

# A replan after every tenth of the run, from recorded steps a quarter of that long. The same experts module in all stages.
REPLAN_INTERVAL="$((ITERS >= 40 ? ITERS / 10 : 4))"
COMMON=(--scalemoe-experts grouped --scalemoe-trace-interval "$((REPLAN_INTERVAL / 4))")
BALANCE=(--scalemoe-replicas "$REPLICAS" --scalemoe-replan-interval "$REPLAN_INTERVAL" --scalemoe-sequence-placement affinity)

# run_stage NAME FLAG ...: trains; standard output goes to $LOGS/NAME/train.log, too.
run_stage() {
    local stage="$1" folder="$LOGS/$1" flags
    shift
    flags=(--config "$EXAMPLE/stages.yaml" --expert-model-parallel-size "$RANKS" --micro-batch-size "$((32 / RANKS))"
        --train-iters "$ITERS" "$@" --results-dir "$LOGS" --run-name "$stage")
    # Mistakes in the flags come from one process, not from every rank.
    "$VENV_PYTHON" "$EXAMPLE/arguments.py" "${flags[@]}"
    # A stage that was stopped early has left its log only.
    [[ ! -e "$folder" || -f "$folder/config.json" || -f "$folder/train.log" || -z "$(ls -A "$folder")" ]] ||
        die "$folder is no folder of a stage, and would be replaced" "try:   LOGS=another/folder bash $0"
    rm -rf "$folder"
    mkdir -p "$folder"
    say "$stage: $ITERS iterations on $RANKS ranks, to $folder"
    # The -- keeps torchrun from reading the training script's flags as abbreviations of its own.
    "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$RANKS" -- "$EXAMPLE/pretrain_gpt.py" "${flags[@]}" |
        tee "$folder/train.log"
}

# TFLOPs of one rank's matrix products in an expert of stages.yaml, measured: what `scalemoe compare` must know of the machine.
measure_TFLOPs() {
    "$VENV_PYTHON" -c '
import statistics, time, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
x, w = torch.randn(512, 128, device=device), torch.randn(128, 512, device=device)
def product_s(products=50):
    began = time.perf_counter()
    for _ in range(products):
        x @ w
    (x @ w).sum().item()
    return (time.perf_counter() - began) / (products + 1)
product_s()
print(f"{2 * 512 * 128 * 512 / statistics.median(product_s() for _ in range(7)) / 1e12:.4g}")'
}

# explore FOLDER: every solver on the recorded routing and the topology of this stage, computed; to compare.json.
explore() {
    say "comparing every solver on the recorded routing ..."
    "${SCALEMOE[@]}" compare --topology "$1/topology.yaml" --trace "$1/routing.npz" --replicas "$REPLICAS" --time-budget 2 --quiet \
        --no-gated --bytes-per-value 4 --gpu-tflops "$(measure_TFLOPs)" --force -o "$1/compare.json"
}

# measure_topology FILE: the network between RANKS ranks of this machine.
measure_topology() {
    say "measuring the network between $RANKS ranks of this machine ..."
    "${SCALEMOE[@]}" topology measure --ranks "$RANKS" --quiet --force -o "$1"
}
