#!/usr/bin/env bash
# Applies our patches to a checkout of Megatron-LM, whichever tag's it is: bash tools/apply_patches.sh [--check] CHECKOUT
# --check changes nothing. Exit code 1: the files are not those of a tag that has patches; then nothing is changed either.
set -euo pipefail
PATCHES=$(cd "$(dirname "${BASH_SOURCE[0]}")/../patches/megatron" && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

# Patches on stdin -> lines "FILE HASH_BEFORE HASH_AFTER" of the files that they change.
files_of() {
    awk '/^diff --git/ {file = substr($4, 3)} /^index/ {split($2, hash, "\\.\\."); print file, hash[1], hash[2]}'
}

# Of a tag: "new" or "applied" on stdout if every file that its patches change is as at the tag, or as patched.
state_of() {
    local file before after now state=applied
    while read -r file before after; do
        now=$(git hash-object --no-filters "$checkout/$file" 2>/dev/null) || return 1
        if [[ $now == "$before" ]]; then
            state=new
        elif [[ $now != "$after" ]]; then
            return 1
        fi
    done < <(cat "$PATCHES/$1"/*.patch | files_of)
    echo "$state"
}

check=
if [[ ${1:-} == --check ]]; then
    check=yes
    shift
fi
[[ $# == 1 && $1 != -* ]] || fail "usage: bash tools/apply_patches.sh [--check] CHECKOUT"
[[ -f "$1/megatron/core/package_info.py" ]] || fail "$1 is not a checkout of Megatron-LM: no megatron/core/package_info.py"
checkout=$(cd "$1" && pwd)

# By the files themselves: the version in a checkout is not always its tag's (core_v0.19.0 says 0.19.1).
for folder in "$PATCHES"/core_v*; do
    tag=$(basename "$folder")
    state=$(state_of "$tag") && break
    state=""
done
[[ -n $state ]] || fail "$checkout has the files of none of: $(cd "$PATCHES" && echo core_v*). Undo changes in them, take one of these tags, \
or use python -m megatron_scalemoe.launch, which needs no patch"

if [[ $state == applied ]]; then
    echo "$tag is applied already"
    exit
fi
for patch in "$PATCHES/$tag"/*.patch; do
    # The ceiling: a checkout without .git must not be taken for a part of a repository around it.
    (cd "$checkout" && GIT_CEILING_DIRECTORIES=$(dirname "$checkout") git apply --unidiff-zero ${check:+--check} "$patch")
    echo "$tag/$(basename "$patch") $([[ -n $check ]] && echo applies || echo applied)"
done
[[ -n $check || $(state_of "$tag") == applied ]] || fail "$tag: the result is not what was tested"
