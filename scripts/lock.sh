#!/usr/bin/env bash
# Lock: writes constraints.txt, the versions that the set-up installs, from the newest that pyproject.toml allows today.
# Use the oldest Python that is supported (PYTHON=python3.11 scripts/lock.sh), then run scripts/test.sh with the result.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -P -m pip install --disable-pip-version-check --editable '.[dev]'
{
    echo "# Versions that scripts/setup.sh installs. Written by scripts/lock.sh with $("$work/venv/bin/python" -V); do not edit."
    # without local parts: 2.13.0 also accepts 2.13.0+cpu
    "$work/venv/bin/python" -P -m pip freeze --disable-pip-version-check --exclude-editable | sed 's/+[^ ;]*//'
} >"$work/constraints.txt"
mv "$work/constraints.txt" constraints.txt
