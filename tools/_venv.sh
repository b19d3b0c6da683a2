# Sourced by the other tools: makes .venv with the package and all it needs, or reuses it. Sets ROOT and VENV_PYTHON.
#
# PYTHON names the interpreter for a new .venv. A CUDA build of torch that this interpreter already has is kept.
# An unchanged .venv is reused without asking the network: a stamp in it says what it was made from.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV_PYTHON="$ROOT/.venv/bin/python"

say() { echo "$@" >&2; }

die() {
    say "error: $1"
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

# megatron-core 0.16.1 has wheels for Python 3.10 to 3.13.
is_supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
    [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_supported_python "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.10 to 3.13 found (tried ${candidates[*]})" \
        "found: $("${candidates[0]}" --version 2>&1 || true)" \
        "try:   sudo apt-get install python3 python3-venv, or PYTHON=/path/to/python3.12 bash $0"
}

# CUDA builds of torch that Megatron-Core can use; the import also shows that the build works at all.
has_cuda_torch() {
    "$1" -c '
import sys, torch
version = tuple(int(n) for n in torch.__version__.split(".")[:2])
sys.exit(not (torch.version.cuda and version >= (2, 6)))' >/dev/null 2>&1
}

make_venv() {
    local python options=()
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make virtual environments" "try:   sudo apt-get install python3-venv"
    if has_cuda_torch "$python"; then
        say "Keeping the CUDA torch of $python."
        options=(--system-site-packages)
    fi
    say "Making $ROOT/.venv with $("$python" --version) ..."
    "$python" -m venv --clear "${options[@]}" "$ROOT/.venv"
    if [[ ${#options[@]} -gt 0 ]] && "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)'; then
        # --system-site-packages means the base interpreter's: the packages of the venv that is active now need a path of their own.
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$VENV_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/active_venv.pth"
    fi
}

install_package() {
    local torch=("torch==2.13.0")
    has_cuda_torch "$VENV_PYTHON" && torch=()
    say "Installing into $ROOT/.venv; the first time this takes some minutes ..."
    "$VENV_PYTHON" -m pip install --quiet "${torch[@]}" -e "$ROOT[train,report,dev]" >&2 ||
        die "pip could not install the package" "try:   read pip's message above; behind a proxy or mirror, configure pip for it (pip config)"
}

ensure_venv() {
    local stamp
    # The path is part of it: a copied checkout must not run the original's sources.
    stamp="$({ echo "$ROOT" && find "$ROOT"/{pyproject.toml,setup.py,csrc} -type f -print0 | sort -z | xargs -0 cat; } | sha256sum | cut -d' ' -f1)"
    if [[ "$(cat "$ROOT/.venv/scalemoe-stamp" 2>/dev/null)" == "$stamp" ]] && "$VENV_PYTHON" -c 'import megatron_scalemoe' 2>/dev/null; then
        return
    fi
    "$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    is_supported_python "$VENV_PYTHON" || die "$ROOT/.venv has an unsupported $("$VENV_PYTHON" --version)" "try:   rm -r $ROOT/.venv"
    install_package
    echo "$stamp" >"$ROOT/.venv/scalemoe-stamp"
}

ensure_venv
