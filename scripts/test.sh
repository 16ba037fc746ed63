#!/usr/bin/env bash
# Test: sets up .venv on the first run, then lints, type-checks and runs pytest with the arguments given.
extra=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    set -- -n "$(nproc)" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
