#!/usr/bin/env bash
# Test: sets up .venv on the first run, then lints, type-checks and runs pytest with the arguments given.
# -P, --config and --confcutdir: what else lies in this folder is neither imported nor read as configuration.
extra=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export PYTHONDONTWRITEBYTECODE= # tests start hundreds of processes, which would compile the package's modules anew each time
if [ $# -eq 0 ]; then
    "$python" -P -m ruff check --config pyproject.toml .
    "$python" -P -m ruff format --config pyproject.toml --check .
    "$python" -P -m mypy --config-file pyproject.toml
    cores=$("$python" -P -c "from fastppo.system.cpus import available_cores; print(available_cores())")
    # one more than cores: many tests wait, for other processes or for a time limit
    set -- -n "$((cores + 1))" --dist loadfile --no-loadscope-reorder
fi
exec "$python" -P -m pytest --config-file pyproject.toml --confcutdir tests "$@"
