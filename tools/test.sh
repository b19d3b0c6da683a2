#!/usr/bin/env bash
# Sets everything up and runs the whole test suite; arguments go to pytest: bash tools/test.sh -k dispatch
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"
cd "$ROOT"
exec "$VENV_PYTHON" -m pytest "$@"
