#!/usr/bin/env bash
# Release: checks that this commit can be released, and builds and tries it. It changes nothing outside dist/ and uploads nothing.
# `scripts/release.sh check` makes the first checks only. Run .ci/run before it. Needs a package index.
#   PYTHON   the interpreter to build and try with; python3 if not set
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf '%s\n' "$@" >&2
    exit 2
}

# A clean tree, and one version everywhere that is not released yet. Sets $version.
check() {
    local newest cited
    [ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed: git status"
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    newest=$(sed -n 's/^## \([^ ]*\).*/\1/p' CHANGELOG.md | head -n 1)
    cited=$(sed -n 's/^version: //p' CITATION.cff)
    [ "$newest" = "$version" ] || fail "CHANGELOG.md's newest heading is $newest, and the version in pyproject.toml is $version"
    [ "$cited" = "$version" ] || fail "the version in CITATION.cff is $cited, and in pyproject.toml $version"
    ! git rev-parse -q --verify "refs/tags/v$version" >/dev/null || fail "the tag v$version is there already: raise the version"
    echo "checked: a clean tree, version $version in pyproject.toml, CHANGELOG.md and CITATION.cff, no tag v$version"
}

# sdist, wheel, and wheel without compiled functions in dist/, from a clone of this commit: nothing that merely lies here gets in.
build() {
    local make
    git clone -q . "$work/source"
    "${PYTHON:-python3}" -m venv "$work/build"
    "$work/build/bin/python" -m pip install -q --disable-pip-version-check build
    rm -rf dist
    make=("$work/build/bin/python" -m build --outdir dist "$work/source")
    "${make[@]}" >"$work/build.log" 2>&1 || fail "$(tail -n 20 "$work/build.log")"
    wheel=$(echo dist/*.whl)
    FASTPPO_KERNELS=0 "${make[@]}" --wheel >"$work/build.log" 2>&1 || fail "$(tail -n 20 "$work/build.log")"
    pure=dist/fastppo-$version-py3-none-any.whl
    [ -e "$pure" ] || fail "there is no $pure in dist/"
    echo "built: $(cd dist && echo *)"
}

# Every file of fastppo/, no other module, and the compiled functions.
check_wheel() {
    local differing kernels
    "$work/build/bin/python" -c 'import sys, zipfile; print(*zipfile.ZipFile(sys.argv[1]).namelist(), sep="\n")' "$wheel" |
        grep -v '\.dist-info/' | sort >"$work/files"
    differing=$(diff <(git ls-files fastppo | sort) <(grep -v '\.bin$' "$work/files")) ||
        fail "the wheel and fastppo/ differ in these files:" "$differing"
    kernels=$(grep -c '\.bin$' "$work/files") || fail "the wheel has no fused/kernels_*.bin: is there a C++ compiler?"
    echo "checked: $(wc -l <"$work/files") files in the wheel, $kernels of them compiled"
}

# All that is needed has wheels for every Python that pyproject.toml names. Installs nothing; takes minutes.
check_pythons() {
    local python pythons
    pythons=$(sed -n 's/.*"Programming Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml)
    for python in $pythons; do
        "$work/build/bin/python" -m pip install -q --disable-pip-version-check --dry-run --ignore-installed --only-binary=:all: \
            --python-version "$python" --target "$work/none" "$pure" || fail "what fastppo needs has no wheels for Python $python"
    done
    echo "checked: all that is needed has wheels for Python" $pythons
}

# In an empty environment and an empty folder, with the versions of constraints.txt; then without compiled functions and compiler.
try_wheels() {
    local constraints=$PWD/constraints.txt wheel=$PWD/$wheel pure=$PWD/$pure
    "${PYTHON:-python3}" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check --constraint "$constraints" "$wheel"
    mkdir "$work/empty"
    cd "$work/empty"
    export XDG_CACHE_HOME=$work/cache
    [ "$("$work/venv/bin/fastppo" --version)" = "fastppo $version" ] || fail "fastppo --version does not say $version"
    "$work/venv/bin/fastppo" train --total-timesteps 5000 --compile on
    "$work/venv/bin/fastppo" evaluate --episodes 5
    "$work/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps --force-reinstall "$pure"
    CXX=none "$work/venv/bin/fastppo" train --total-timesteps 5000
    cd - >/dev/null
    echo "checked: installed in an empty environment, both wheels train and evaluate"
}

check
[ "${1:-}" != check ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build
check_wheel
try_wheels
check_pythons
cat <<END
next:
  git tag -a v$version -m "fastppo $version" && git push origin v$version
  python -m cibuildwheel --output-dir wheelhouse    # needs docker: the wheel for Linux; $(basename "$wheel") is for this machine
  python -m twine upload dist/*.tar.gz $pure wheelhouse/*.whl
  open the next section of CHANGELOG.md: ## Unreleased
END
