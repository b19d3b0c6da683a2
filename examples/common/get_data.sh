#!/usr/bin/env bash
# Real text for the stages, as Megatron's PREFIX.bin and PREFIX.idx with a token for each byte: the given files and folders, or the Python
# standard library's sources. Both examples read the same.
#
#   [DATA=data/text] bash examples/EXAMPLE/get_data.sh [FILE OR FOLDER ...]
set -euo pipefail
COMMON="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for argument in "$@"; do
    if [[ "$argument" == -* ]]; then
        sed -n '2,/^[^#]/ { s/^# \{0,1\}//p }' "$0" | sed "s/EXAMPLE/${EXAMPLE:-gpt_moe}/g"
        [[ "$argument" == -h || "$argument" == --help ]] && exit 0
        exit 2
    fi
done
source "$COMMON/../../tools/_venv.sh"

DATA="${DATA:-data/text}"
# Megatron warns of GPU libraries, which this does not need.
"$VENV_PYTHON" -W ignore::UserWarning "$COMMON/preprocess_data.py" "$DATA" "$@"
