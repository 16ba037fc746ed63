"""scripts/ and .ci/run in a copy of the repository, with a Python that stands in for the one that takes minutes: it records
what it is asked to do, and passes ruff on to the real one.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts are bash")

# Its own folder tells it where to write what it was asked to do. Environment variables make it fail in the ways that a machine
# may fail in.
STAND_IN = r"""#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
    *version_info*) [ -z "$TOO_OLD" ] ;;
    -V) echo "Python 3.9.2" ;;
    *"import ensurepip"*) [ -z "$NO_VENV" ] ;;
    *"-m venv"*) rm -rf "${@: -1}" && mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" && touch "${@: -1}/pip" ;;
    *"-m ensurepip"*) false ;;
    *"-m pip --version"*) [ -e "$(dirname "$0")/../pip" ] ;;
    *"-m pip install"*)
        [ -z "$PIP_FAILS" ] || { echo "no such package" >&2; exit 1; }
        printf 'Collecting numpy\n  Downloading numpy.whl (16.9 MB)\n  Downloading rich.whl (3 kB)\n'
        printf 'Installing collected packages: a, b, c\n' ;;
    *"-m ruff"*) exec "$REAL_PYTHON" "$@" ;;
    *available_cores*) echo 2 ;;
    *"-m fastppo.train"*) echo "trains in $PWD" ;;
esac
"""


class Clone:
    """A copy of what the scripts read, in a folder with a space in its name."""

    def __init__(self, path):
        self.path, self.calls = path / "my clone", path / "calls"
        for folder in ("scripts", ".ci", "fastppo", "tests", "benchmarks"):
            shutil.copytree(ROOT / folder, self.path / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.path / name)
        (path / "bin").mkdir()
        self.python = path / "bin" / "python3"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)
        self.calls.touch()

    def start(self, script, *args, cwd=None, **variables):
        """The script's process, with the stand-in as the only python3."""
        path = f"{self.python.parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "CALLS": str(self.calls), "REAL_PYTHON": sys.executable, "HOME": str(self.path)}
        return subprocess.Popen(
            ["bash", str(self.path / "scripts" / script), *args],
            cwd=cwd or self.path,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script, *args, **options):
        """(exit code, stdout, stderr, what Python was asked to do), of this call."""
        self.calls.write_text("")
        process = self.start(script, *args, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, self.calls.read_text().splitlines()

    def installs(self):
        """How often pip has installed since the last `run` began."""
        return sum("-m pip install" in line for line in self.calls.read_text().splitlines())


@pytest.fixture
def clone(tmp_path):
    """A new one each."""
    return Clone(tmp_path)


def test_the_first_run_sets_up_and_the_second_starts_at_once(clone, tmp_path):
    """From another folder, where it then trains; the versions are those of constraints.txt, and larger downloads are shown."""
    code, out, err, calls = clone.run("train.sh", "--num-envs", "8", cwd=tmp_path)
    assert (code, out) == (0, f"trains in {tmp_path}\n")
    assert err.splitlines() == [
        "setting up .venv (once, some minutes)",
        "  Downloading numpy.whl (16.9 MB)",
        "  installing 3 packages",
    ]
    (install,) = [call for call in calls if "pip install" in call]
    assert install.endswith("--constraint constraints.txt --editable .")
    assert calls[-1] == "-m fastppo.train --num-envs 8"
    assert clone.run("train.sh")[2:] == ("", ["-m fastppo.train"])
    code, _, _, calls = clone.run("test.sh", "tests/test_x.py")
    assert code == 0
    assert sum(call.endswith("--editable .[dev]") for call in calls) == 1
    assert calls[-1] == "-P -m pytest --config-file pyproject.toml --confcutdir tests tests/test_x.py"


def test_a_gpu_is_measured_with_the_packages_of_development(clone):
    """gpu.sh: its tests need pytest, its workloads EnvPool. Flags are those of the benchmark."""
    code, _, _, calls = clone.run("gpu.sh", "--budget", "300")
    assert code == 0
    assert sum(call.endswith("--editable .[dev]") for call in calls) == 1
    assert calls[-1] == "benchmarks/gpu.py --budget 300"


def newer(path):
    """Make a file newer than what was written before."""
    later = time.time() + 10
    os.utime(path, (later, later))


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_another_lock_is_installed(name, clone):
    """Once: what has changed since the last set-up."""
    clone.run("train.sh")
    newer(clone.path / name)
    _, _, _, calls = clone.run("train.sh")
    assert clone.installs() == 1
    assert not any("-m venv" in call for call in calls)


def test_other_versions_can_be_asked_for(clone):
    """FASTPPO_CONSTRAINTS names another file of constraints, which is used at once."""
    clone.run("train.sh")
    _, _, _, calls = clone.run("train.sh", FASTPPO_CONSTRAINTS="/dev/null")
    assert any("--constraint /dev/null" in call for call in calls)


def test_an_interrupted_set_up_is_continued(clone):
    """pip fails: exit code 2, what it said and what to do; the next run installs into the same .venv."""
    code, out, err, _ = clone.run("train.sh", PIP_FAILS="1")
    assert (code, out) == (2, "")
    assert err.splitlines()[-2:] == [
        "no such package",
        "the set-up failed; what pip says is above. The same command tries again",
    ]
    code, out, _, calls = clone.run("train.sh")
    assert code == 0
    assert clone.installs() == 1
    assert not any("-m venv" in call for call in calls)


@pytest.mark.parametrize("damage", ["no pip", "no python", "a Python that is gone"])
def test_a_broken_venv_is_made_anew(damage, clone):
    """Interrupted before it had pip, or its interpreter was removed."""
    clone.run("train.sh")
    python = clone.path / ".venv" / "bin" / "python"
    if damage == "no pip":
        (clone.path / ".venv" / "pip").unlink()
        (clone.path / ".venv" / ".installed").unlink()
    else:
        python.unlink()
    if damage == "a Python that is gone":
        python.symlink_to("/no/such/python3")
    code, _, _, calls = clone.run("train.sh")
    assert code == 0
    assert sum("-m venv --clear .venv" in call for call in calls) == 1


def test_a_clone_that_was_moved_is_set_up_again(clone, tmp_path):
    """An editable install points to a folder: to the one where it was made."""
    clone.run("train.sh")
    clone.path = clone.path.rename(tmp_path / "elsewhere")
    assert clone.run("train.sh")[0] == 0
    assert clone.installs() == 1


@pytest.mark.skipif(shutil.which("flock") is None, reason="two at once are kept apart by flock")
def test_of_two_at_once_one_sets_up(clone):
    """The other waits, says so, and finds the work done."""
    import fcntl

    clone.run("train.sh")
    mark = clone.path / ".venv" / ".installed"
    mark.rename(clone.path / "mark")
    clone.calls.write_text("")
    lock = os.open(clone.path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    process = clone.start("train.sh")
    assert process.stderr.readline() == "waiting for another set-up of .venv\n"
    (clone.path / "mark").rename(mark)
    os.close(lock)
    assert process.communicate(timeout=60) == (f"trains in {clone.path}\n", "")
    assert (process.returncode, clone.installs()) == (0, 0)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"TOO_OLD": "1"}, r"fastppo needs Python 3\.11 or newer, and python3 is Python 3\.9\.2; .*PYTHON=python3\.12"),
        ({"NO_VENV": "1"}, r"python3 cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"),
        ({"PYTHON": "python9"}, r"there is no python9; install Python 3\.11 or newer, or name one: PYTHON=/path/to/python"),
    ],
    ids=["too old", "no venv", "missing"],
)
def test_a_python_that_will_not_do(variables, told, clone):
    """Exit code 2 and one line that says what to do; nothing is left half-made."""
    code, out, err, _ = clone.run("train.sh", **variables)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "setting up .venv (once, some minutes)"
    assert re.match(told, err.splitlines()[1])
    assert len(err.splitlines()) == 2
    assert not (clone.path / ".venv").exists()


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root writes everywhere")
def test_a_read_only_clone_is_told(clone):
    """Exit code 2, one line."""
    clone.path.chmod(0o555)
    try:
        code, _, err, _ = clone.run("train.sh")
    finally:
        clone.path.chmod(0o755)
    assert code == 2
    assert err == f"{clone.path} is read-only; clone fastppo to a folder that you can write to\n"


def test_what_lies_beside_the_code_changes_nothing(clone):
    """The results of training, an environment of one's own, notebooks, other tools' settings, folders named as our modules."""
    for folder in ("runs/CartPole", "support", "environments", "test_seeds", "torch"):
        (clone.path / folder).mkdir(parents=True)
        (clone.path / folder / "__init__.py").write_text("import   sys, os\n")
    for name in ("reach.py", "fastppo.py", "conftest.py", "setup.py"):
        (clone.path / name).write_text("import   sys, os\nraise SystemExit('imported')\n")
    (clone.path / "ruff.toml").write_text('[lint]\nselect = ["ALL"]\n')
    (clone.path / "mypy.ini").write_text("[mypy]\nfiles = nothing\n")
    (clone.path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag\n")
    (clone.path / "try.ipynb").write_text('{"cells": []}')
    code, out, err, calls = clone.run("test.sh")
    assert code == 0, (out + err)[-2000:]
    assert any(call.startswith("-P -m ruff check") for call in calls)
    assert any(call.startswith("-P -m ruff format") for call in calls)
    assert calls[-1].startswith("-P -m pytest --config-file pyproject.toml --confcutdir tests -n 3")
    (clone.path / "tests" / "test_statistics.py").open("a").write("import   sys\n")
    assert clone.run("test.sh")[0] != 0  # so it does look


def test_ci_does_what_a_reader_does():
    """The commands of README's first block in their order, then the gate; with a compiler, and with nothing left behind."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    read = [line.split("#")[0].strip() for line in block.splitlines() if line.startswith("scripts/")]
    assert len(read) == 2
    script = (ROOT / ".ci" / "run").read_text()
    steps = [
        "export FASTPPO_REQUIRE_COMPILER=1", *(f"\n{line}\n" for line in read), "benchmarks/gate.py", "git status --porcelain"
    ]  # fmt: skip
    assert sorted(steps, key=script.index) == steps


def test_every_locked_version_is_one_that_is_allowed():
    """Those of pyproject.toml's ranges that constraints.txt names; all that it requires are there, without local parts."""
    import tomllib

    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    locked = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)
    locked = {name.lower().replace("_", "-"): version for name, version in locked.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = re.search(r"fastppo\[(.*)\]", extras["dev"][-1])[1].split(",")
    wanted = [*project["dependencies"], *extras["dev"][:-1], *(name for extra in tested for name in extras[extra])]
    for requirement in map(Requirement, wanted):
        assert locked[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement
