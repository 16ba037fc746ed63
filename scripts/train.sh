#!/usr/bin/env bash
# Train: sets up .venv on the first run, then passes its arguments to `python -m fastppo.train`, in the folder it was called from.
here=$(pwd)
extra=
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python=$(pwd)/$python
cd "$here"
exec "$python" -m fastppo.train "$@"
