#!/usr/bin/env bash
# The tests that concern environments on the oldest gymnasium that pyproject.toml declares, or on the version given, in a virtual
# environment of their own: scripts/test_oldest.sh [VERSION] [arguments of pytest]. Needs a package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
version=${1:-$(sed -n 's/.*"gymnasium\[classic-control\]>=\([0-9.]*\)".*/\1/p' pyproject.toml)}
shift || true
oldest=$(mktemp -d)
trap 'rm -rf "$oldest"' EXIT
python3 -m venv "$oldest"
grep -v "^gymnasium==" constraints.txt >"$oldest/constraints.txt"
"$oldest/bin/python" -m pip install --quiet --constraint "$oldest/constraints.txt" --editable ".[dev]" "gymnasium==$version"
names=(versions autoreset check env_faults composite_actions episodes grouped masks probes rollout seeds spaces video)
"$oldest/bin/python" -m pytest -n 0 $(printf "tests/test_%s.py " "${names[@]}") "$@"
