#!/usr/bin/env bash
# Builds the CPU library with the address and undefined-behaviour sanitizers and runs tests on it; the first finding ends the run. By default
# the tests of shared memory and of the ops; arguments go to pytest instead: bash tools/sanitize.sh tests/ops -k rows
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
PYTHON="${PYTHON:-$ROOT/.venv/bin/python}"
CXX="${CXX:-g++}"
DIRECTORY="$(mktemp -d)"
trap 'rm -rf "$DIRECTORY"' EXIT
"$CXX" -O1 -g -std=c++17 -fPIC -shared -fvisibility=hidden -pthread -Wall -Wextra -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined -DSCALEMOE_SOURCE_HASH='"sanitized"' csrc/cpu/*.cpp \
    -o "$DIRECTORY/libscalemoe_cpu.so"
# The CUDA kernels are another library.
(($#)) || set -- tests/ops/transports/test_shm.py tests/ops/transports/test_shm_corruption.py tests/ops \
    --ignore-glob='tests/ops/transports/test_cuda*'
library() { "$CXX" -print-file-name="$1"; }
# Python and torch are not built with the sanitizers: theirs must be loaded first (with what throws exceptions, which it looks for), and what
# Python keeps until its end is no leak of ours. Findings go straight to stderr, which pytest would otherwise lose with the process.
LD_PRELOAD="$(library libasan.so) $(library libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    SCALEMOE_LIBRARY_DIR="$DIRECTORY" "$PYTHON" -m pytest -q --capture=sys "$@"
