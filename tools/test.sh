#!/usr/bin/env bash
# Sets everything up and runs the whole test suite; arguments go to pytest: bash tools/test.sh -k dispatch
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"
if (($#)); then
    exec "$VENV_PYTHON" -m pytest "$@"
fi
# Two at a time but for those on rank pools, which use all cores themselves. The examples mostly wait for processes to start.
"$VENV_PYTHON" -m pytest -n 2 --dist worksteal -m "not ranks" --ignore tests/examples
"$VENV_PYTHON" -m pytest -n 2 --dist loadfile tests/examples
exec "$VENV_PYTHON" -m pytest -m ranks --ignore tests/examples
