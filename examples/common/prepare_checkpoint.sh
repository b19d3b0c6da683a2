#!/usr/bin/env bash
# A short run of stock Megatron, whose checkpoint all stages start from, so that they can be compared. A stage that finds no checkpoint of its
# own settings (ITERS, DATA, flags) does this itself.
#
#   [RANKS=2] [ITERS=200] bash examples/EXAMPLE/prepare_checkpoint.sh [flags of SCRIPT ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_run.sh"

prepare_checkpoint
