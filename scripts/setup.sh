# Sourced by train.sh and test.sh: changes to the repository's root, sets up .venv where that has not been done, leaves $python set.
# Usage: extra=NAME; . scripts/setup.sh      (no positional argument: a sourced script without any sees its caller's)
#   PYTHON                the interpreter that .venv is made with; python3 if not set
#   FASTPPO_CONSTRAINTS   a pip constraints file instead of constraints.txt (/dev/null: none), where a version of it cannot be had
# A file in .venv marks what is installed, and from which folder. It is written last, so an interrupted set-up is continued.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
mark=.venv/.installed${extra:+-$extra}
constraints=${FASTPPO_CONSTRAINTS:-constraints.txt}

fail() {
    printf '%s\n' "$@" >&2
    exit 2
}

is_set_up() {
    [ -x "$python" ] && [ "$(cat "$mark" 2>/dev/null)" = "$PWD $constraints" ] &&
        ! [ pyproject.toml -nt "$mark" ] && ! [ "$constraints" -nt "$mark" ]
}

make_venv() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "there is no $base; install Python 3.11 or newer, or name one: PYTHON=/path/to/python"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "fastppo needs Python 3.11 or newer, and $base is $("$base" -V 2>&1); name another: PYTHON=python3.12 $0"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
    "$base" -m venv --clear .venv >&2
}

# pip's output on a terminal; elsewhere only its larger downloads and its last step
show_progress() {
    local line words
    while IFS= read -r line; do
        case $line in
            *"Downloading "*" MB)") echo "$line" ;;
            "Installing collected packages:"*) read -ra words <<<"${line#*:}" && echo "  installing ${#words[@]} packages" ;;
        esac
    done
}

install() {
    local command=("$python" -P -m pip install --disable-pip-version-check --constraint "$constraints" --editable ".${extra:+[$extra]}")
    if [ -t 2 ]; then
        "${command[@]}" >&2
    else
        "${command[@]}" | show_progress >&2
    fi
}

set_up() {
    [ -w . ] || fail "$PWD is read-only; clone fastppo to a folder that you can write to"
    if command -v flock >/dev/null; then # of two at the same time the second waits
        exec 9<.
        flock -n 9 || { echo "waiting for another set-up of .venv" >&2 && flock 9; }
    fi
    if ! is_set_up; then
        echo "setting up .venv (once, some minutes)" >&2
        "$python" -P -m pip --version >/dev/null 2>&1 || "$python" -P -m ensurepip >/dev/null 2>&1 || make_venv
        install || fail "the set-up failed; what pip says is above. The same command tries again"
        printf '%s' "$PWD $constraints" >"$mark"
    fi
    exec 9<&-
}

is_set_up || set_up
