#!/usr/bin/env bash
# Proves every patch against the tag it is for: bash tools/check_patches.sh CLONE, a clone of Megatron-LM. Does not touch it.
# Exit code 1: one does not fit, or CLONE has none of the tags. A tag that it does not have is said to be unproved.
set -euo pipefail
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

[[ $# == 1 ]] || fail "usage: bash tools/check_patches.sh CLONE"
clone=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

proved=0
for patches in "$TOOLS"/../patches/megatron/core_v*; do
    tag=$(basename "$patches")
    git -C "$clone" rev-parse --quiet --verify "$tag^{commit}" >/dev/null || {
        echo "$tag: not proved, $clone does not have this tag (git fetch --tags)"
        continue
    }
    for patch in "$patches"/*.patch; do
        awk '/^diff --git/ {hunk = 0} hunk && !/^[+@]/ {exit 1} /^@@/ {hunk = 1}' "$patch" || fail "$patch must only add lines, without context"
    done
    mkdir "$folder/$tag"
    git -C "$clone" archive "$tag" megatron | tar -x -C "$folder/$tag"
    bash "$TOOLS/apply_patches.sh" --check "$folder/$tag"
    bash "$TOOLS/apply_patches.sh" "$folder/$tag"
    bash "$TOOLS/apply_patches.sh" --check "$folder/$tag"
    awk '/^diff --git/ {print substr($4, 3)}' "$patches"/*.patch | sort -u | while read -r file; do
        python3 -c 'import ast, sys; ast.parse(open(sys.argv[1], encoding="utf-8").read())' "$folder/$tag/$file"
    done
    echo "$tag: proved"
    proved=$((proved + 1))
done
((proved > 0)) || fail "nothing was proved"
