# Sourced by the scripts beside it, which examples/gpt_moe/*.sh and examples/bert_moe/*.sh start with EXAMPLE set to their folder's name. A
# stage is one training run of stages.yaml's model, with its log and all it records in $LOGS/<stage>.
# shellcheck shell=bash disable=SC2034

COMMON="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
case "${EXAMPLE:-}" in
    gpt_moe) script=pretrain_gpt.py ;;
    bert_moe) script=pretrain_bert.py ;;
    *)
        echo "error: start this as examples/gpt_moe/$(basename "$0") or examples/bert_moe/$(basename "$0")" >&2
        exit 1
        ;;
esac
TRAIN="$COMMON/../$EXAMPLE/$script"

# The comment at the top of the script is its help.
for argument in "$@"; do
    if [[ "$argument" == -h || "$argument" == --help ]]; then
        sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0" | sed "s/EXAMPLE/$EXAMPLE/g; s/SCRIPT/$script/g"
        cat <<HELP

RANKS=N      CPU ranks or GPUs, all one expert-parallel group: 2, 4, 8 or 16 (default: 4, or 2 with fewer than 4 cores)
ITERS=N      iterations (default 200); the first quarter are prepare_checkpoint.sh's, and all stages go on from there
LOGS=FOLDER  where the stages have their folders (default logs/$EXAMPLE); a stage that is run again replaces its folder
DATA=PREFIX  PREFIX.bin and PREFIX.idx, the text to train on; get_data.sh makes them (default: data/text where that was made, else the
             Python standard library's sources)
REPLICAS=N   run_kmeans.sh and run_ga.sh: slots per layer for copies of hot experts, over all ranks (default 8)
TOPOLOGY=F   run_ga.sh: the cluster (default: measured on this machine)

Other arguments go to the training script and win over stages.yaml; its flags: python examples/common/arguments.py --help
HELP
        exit 0
    fi
done

source "$COMMON/../../tools/_venv.sh"
SCALEMOE=("$VENV_PYTHON" -m megatron_scalemoe.cli.main)
cores="$("$VENV_PYTHON" -c 'from megatron_scalemoe.environment import usable_cores; print(usable_cores())')"
RANKS="${RANKS:-$((cores < 4 ? 2 : 4))}"
ITERS="${ITERS:-200}"
LOGS="${LOGS:-logs/$EXAMPLE}"
DEFAULT_DATA=data/text
[[ -n "${DATA:-}" || ! -f "$DEFAULT_DATA.idx" ]] || DATA="$DEFAULT_DATA"
PREPARED="$LOGS/prepared" # one level deeper than the stages, so that the report does not take it for one
REPLICAS="${REPLICAS:-8}"

check_settings() {
    local argument
    [[ "$RANKS" =~ ^(2|4|8|16)$ ]] || die "RANKS must be 2, 4, 8 or 16: they share 16 experts and 32 sequences" "found: $RANKS"
    [[ "$ITERS" =~ ^[1-9][0-9]*$ ]] || die "ITERS must be a number of iterations, 1 or more" "found: $ITERS"
    [[ "$REPLICAS" =~ ^[0-9]+$ && $((REPLICAS % RANKS)) == 0 ]] ||
        die "REPLICAS must be a multiple of the ranks" "found: $REPLICAS for $RANKS ranks"
    [[ -z "${DATA:-}" || -f "$DATA.bin" && -f "$DATA.idx" ]] ||
        die "DATA names no PREFIX.bin and PREFIX.idx" "found: $DATA" "try:   DATA=$DATA bash examples/$EXAMPLE/get_data.sh FILE-OR-FOLDER"
    [[ -z "${TOPOLOGY:-}" || -f "$TOPOLOGY" ]] || die "TOPOLOGY names no file" "found: $TOPOLOGY" "try:   scalemoe topology measure -o FILE"
    for argument in "$@"; do
        case "$argument" in
            --run-name* | --results-dir* | --scalemoe-trace-path*) die "$argument is the stage's own" "try:   LOGS=folder bash $0" ;;
            --train-iters*) die "$argument: the iterations are ITERS" "try:   ITERS=400 bash $0" ;;
            --load* | --save | --save=*) die "a stage starts from prepare_checkpoint.sh's checkpoint" "found: $argument" "try:   $script itself" ;;
        esac
    done
}
check_settings "$@"

# The user's flags that stock Megatron has, too: those of ours are left out, with their values.
SHARED_FLAGS=()
ours=false
for argument in "$@"; do
    case "$argument" in
        --scalemoe-* | --moe-dispatcher*) ours=true ;;
        --*) ours=false ;;
    esac
    "$ours" || SHARED_FLAGS+=("$argument")
done

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"

# A replan after every tenth of the run, from recorded steps a quarter of that long. The same experts module in all stages.
REPLAN_INTERVAL="$((ITERS >= 40 ? ITERS / 10 : 4))"
RECORDED=(--scalemoe-experts grouped --scalemoe-trace-interval "$((REPLAN_INTERVAL / 4))")
BALANCE=(--scalemoe-replicas "$REPLICAS" --scalemoe-replan-interval "$REPLAN_INTERVAL" --scalemoe-sequence-placement affinity)

# train FOLDER FLAG ...: one run, its results and standard output to FOLDER.
train() {
    local folder="$1" data=() flags
    shift
    [[ -z "${DATA:-}" ]] || data=(--data-path "$DATA")
    flags=(--config "$COMMON/stages.yaml" --expert-model-parallel-size "$RANKS" --micro-batch-size "$((32 / RANKS))"
        --train-iters "$ITERS" --lr-decay-iters "$ITERS" "${data[@]}" "$@" --results-dir "$(dirname "$folder")" --run-name "$(basename "$folder")")
    # Mistakes in the flags come from one process, not from every rank.
    "$VENV_PYTHON" "$COMMON/arguments.py" "${flags[@]}"
    # A run that was stopped early has left its log only.
    [[ ! -e "$folder" || -f "$folder/config.json" || -f "$folder/train.log" || -z "$(ls -A "$folder")" ]] ||
        die "$folder is no folder of a stage, and would be replaced" "try:   LOGS=another/folder bash $0"
    rm -rf "$folder"
    mkdir -p "$folder"
    # The -- keeps torchrun from reading the training script's flags as abbreviations of its own.
    "$VENV_PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$RANKS" -- "$TRAIN" "${flags[@]}" | tee "$folder/train.log"
}

# What a prepared checkpoint depends on: the iterations are those of the learning rate's schedule.
prepared_from() {
    printf '%q ' "$EXAMPLE" "ITERS=$ITERS" "DATA=${DATA:-}" "${SHARED_FLAGS[@]}"
}

# Trains stock Megatron for the first quarter of the run, to $PREPARED/stock/checkpoints.
prepare_checkpoint() {
    local iters="$((ITERS >= 4 ? ITERS / 4 : 1))"
    say "preparing: $iters iterations of stock Megatron on $RANKS ranks, to $PREPARED, on ${DATA:-the Python standard library}'s text"
    train "$PREPARED/stock" --moe-dispatcher stock "${SHARED_FLAGS[@]}" --train-iters "$iters"
    prepared_from >"$PREPARED/from"
}

# run_stage NAME FLAG ...: trains on from the prepared checkpoint, which is made if there is none of these settings.
run_stage() {
    local stage="$1"
    shift
    [[ "$(cat "$PREPARED/from" 2>/dev/null)" == "$(prepared_from)" ]] || prepare_checkpoint
    say "$stage: up to iteration $ITERS on $RANKS ranks, to $LOGS/$stage"
    train "$LOGS/$stage" "$@" --load "$PREPARED/stock/checkpoints"
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
