#!/usr/bin/env bash
# Sets everything up and runs the whole test suite; arguments go to pytest: bash tools/test.sh -k dispatch
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"
if (($#)); then
    exec "$VENV_PYTHON" -m pytest "$@"
fi
# Two at a time but for those on rank pools: these use all cores themselves.
RANKS=(tests/distributed tests/integration)
"$VENV_PYTHON" -m pytest -n 2 --dist worksteal "${RANKS[@]/#/--ignore=}"
exec "$VENV_PYTHON" -m pytest "${RANKS[@]}"
