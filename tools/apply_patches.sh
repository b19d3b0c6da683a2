#!/usr/bin/env bash
# Applies our patches to a checkout of Megatron-LM, by the version in it: bash tools/apply_patches.sh [--check] CHECKOUT
# --check changes nothing. Exit code 1: a file is neither as at the patch's tag nor patched; then nothing is changed either.
set -euo pipefail
PATCHES=$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches/megatron" && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

# Lines "FILE HASH_BEFORE HASH_AFTER" of the files that a patch changes.
files_of() {
    awk '/^diff --git/ {file = substr($4, 3)} /^index/ {split($2, hash, "\\.\\."); print file, hash[1], hash[2]}' "$1"
}

# "new" or "applied" on stdout.
state_of() {
    local file before after now state=applied
    while read -r file before after; do
        [[ -f "$checkout/$file" ]] || fail "$checkout/$file does not exist"
        now=$(git hash-object --no-filters "$checkout/$file")
        if [[ $now == "$before" ]]; then
            state=new
        elif [[ $now != "$after" ]]; then
            fail "$checkout/$file is not the file of $tag: undo its changes, or use python -m megatron_scalemoe.launch, which needs no patch"
        fi
    done < <(files_of "$1")
    echo "$state"
}

check=0
if [[ ${1:-} == --check ]]; then
    check=1
    shift
fi
[[ $# == 1 && $1 != -* ]] || fail "usage: bash tools/apply_patches.sh [--check] CHECKOUT"
[[ -f "$1/megatron/core/package_info.py" ]] || fail "$1 is not a checkout of Megatron-LM: no megatron/core/package_info.py"
checkout=$(cd "$1" && pwd)
version=$(awk '/^(MAJOR|MINOR|PATCH) = / {numbers = numbers "." $3} END {print substr(numbers, 2)}' "$checkout/megatron/core/package_info.py")
tag=core_v$version
[[ -d "$PATCHES/$tag" ]] || fail "no patches for $tag; there are: $(cd "$PATCHES" && echo core_*)"

declare -A states
for patch in "$PATCHES/$tag"/*.patch; do
    states[$patch]=$(state_of "$patch")
done
for patch in "$PATCHES/$tag"/*.patch; do
    name=$tag/$(basename "$patch")
    if [[ ${states[$patch]} == applied ]]; then
        echo "$name is applied already"
    elif ((check)); then
        # The ceiling: a checkout without .git must not be taken for a part of a repository around it.
        (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(dirname "$checkout") git apply --unidiff-zero --check "$patch")
        echo "$name applies"
    else
        (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(dirname "$checkout") git apply --unidiff-zero "$patch")
        [[ $(state_of "$patch") == applied ]] || fail "$name: the result is not what was tested"
        echo "$name applied"
    fi
done
