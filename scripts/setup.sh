# Sourced by train.sh and test.sh: makes .venv if there is none, installs fastppo into it, and leaves $python set.
# Usage: extra=NAME; . scripts/setup.sh      A second run finds its mark and starts at once. (No positional argument: a sourced
# script without any sees its caller's.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
mark=.venv/.installed${extra:+-$extra}
if ! [ -e "$mark" ] || [ pyproject.toml -nt "$mark" ]; then
    echo "setting up .venv (once)" >&2
    [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" >&2
    touch "$mark"
fi
