"""Every package of packages.toml is installed, trained, evaluated and exported as its user would do it; the table says what was
seen.

The slow tests need an index of packages for pip. Their venvs are kept in FASTPPO_PACKAGES_DIR, by default in
~/.cache/fastppo-packages. `scripts/test.sh -m slow tests/packages`.
"""

import json
import math
import shlex

import pytest
from package_list import (
    PAGE,
    RESULTS,
    Package,
    cache_dir,
    find_python,
    has_index,
    make_python,
    packages,
    table,
    try_package,
    with_table,
)

from fastppo.cli import parse_train

PACKAGES = packages()


@pytest.fixture(scope="module")
def index():
    """Skips where pip reaches no index."""
    if not has_index():
        pytest.skip("pip reaches no index of packages")


@pytest.fixture
def python(request):
    """The Python of the package's venv."""
    package = request.getfixturevalue("package")
    if (found := find_python(package, cache_dir())) is not None:
        return found
    request.getfixturevalue("index")
    return make_python(package, cache_dir())


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_is_trained_evaluated_and_exported(package, python, tmp_path):
    """Every command ends with exit code 0, after the steps that were wanted, with a speed and a return."""
    result = try_package(package, python, package.few, tmp_path, episodes=3)
    assert result["steps"] >= package.few
    assert result["sps"] > 0
    assert math.isfinite(result["return"])


def test_the_page_has_the_table_of_the_results():
    """Made by tests/packages/measure.py, which is to be run again after a change of the list."""
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == with_table(PAGE.read_text(), table(PACKAGES, results))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_results_are_of_what_is_listed(package):
    """The version, the command and the number of steps, so that none of them is changed without a measurement."""
    result = json.loads(RESULTS.read_text())[package.name]
    assert (result["version"], result["flags"], result["steps"]) == (package.version, package.flags, package.steps)
    assert math.isfinite(result["return"])
    assert (result["sb3"] is not None) == package.sb3


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_what_is_listed_is_legal(package):
    """Everything is pinned, and `train` takes the flags."""
    assert all("==" in requirement for requirement in package.install + package.afterwards)
    parse_train(shlex.split(package.flags))


def test_a_table_by_hand():
    """Two significant digits of a speed, three of a return, and an empty cell where Stable-Baselines3 cannot train."""
    package = Package("box", ("box[all]==1.2", "other==3"), "--env-id box:Box-v0", "a box", steps=5000)
    text = table((package,), {"box": {"sps": 1264.0, "return": 0.12345, "sb3": None}})
    assert text.splitlines()[2] == "| box[all] 1.2, other 3 | `--env-id box:Box-v0` | 5,000 | 1,300 | 0.123 |  | a box |"
    page = "above\n<!-- made by tests/packages/measure.py -->\nold\n<!-- end -->\nbelow\n"
    assert with_table(page, "new\n") == "above\n<!-- made by tests/packages/measure.py -->\n\nnew\n\n<!-- end -->\nbelow\n"
