#!/usr/bin/env bash
# What a GPU gives, in at most ten minutes after the set-up: tests marked gpu, then a table of eager, captured and compiled programs.
# The last line of the output is one JSON object. Sets up .venv on the first run. Arguments are those of benchmarks/gpu.py.
extra=dev
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$python" benchmarks/gpu.py "$@"
