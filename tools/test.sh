#!/usr/bin/env bash
# Sets everything up and runs the whole test suite; arguments go to pytest: bash tools/test.sh -k dispatch
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"
if (($#)); then
    exec "$VENV_PYTHON" -m pytest "$@"
fi
# Two at a time but for those on rank pools, which use all cores themselves. The examples mostly wait for processes to start.
RANKS=(tests/distributed tests/integration)
EXAMPLES=(tests/integration/test_{example,example_data,example_scripts,bert_example}.py)
"$VENV_PYTHON" -m pytest -n 2 --dist worksteal "${RANKS[@]/#/--ignore=}"
"$VENV_PYTHON" -m pytest -n 2 --dist loadfile "${EXAMPLES[@]}"
exec "$VENV_PYTHON" -m pytest "${RANKS[@]}" "${EXAMPLES[@]/#/--ignore=}"
