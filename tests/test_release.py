"""What a release must hold, without building one (scripts/release.sh does): its first checks, and the files of the package."""

import fnmatch
import runpy
import shutil
import subprocess
import tomllib

import pytest

from support.pages import ROOT

pytestmark = pytest.mark.skipif(not (shutil.which("git") and shutil.which("bash")), reason="needs git and bash")


def git(folder, *words):
    """The output of a git command."""
    name = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def ready(tmp_path):
    """A repository that can be released, of the files that the checks read."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "release.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "fastppo"\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (a day)\n\n## 1.1.0\n")
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.0\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def check(folder):
    """(exit code, stdout, stderr) of the first checks."""
    done = subprocess.run(["bash", folder / "scripts" / "release.sh", "check"], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


def test_what_is_ready_passes(ready):
    """And the line says what was checked."""
    told = "checked: a clean tree, version 1.2.0 in pyproject.toml, CHANGELOG.md and CITATION.cff, no tag v1.2.0\n"
    assert check(ready) == (0, told, "")


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("CHANGELOG.md", "## 1.2.0", "## Unreleased\n\n## 1.2.0", "CHANGELOG.md's newest heading is Unreleased"),
        ("CITATION.cff", "\nversion: 1.2.0", "\nversion: 1.1.0", "the version in CITATION.cff is 1.1.0"),
        ("pyproject.toml", "1.2.0", "1.3.0", "CHANGELOG.md's newest heading is 1.2.0, and the version in pyproject.toml"),
    ],
)
def test_versions_that_differ_are_refused(name, old, new, told, ready):
    """Exit code 2, one line that names both."""
    (ready / name).write_text((ready / name).read_text().replace(old, new))
    git(ready, "commit", "-q", "-a", "-m", "two")
    code, out, err = check(ready)
    assert (code, out) == (2, "")
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_an_unclean_tree_and_a_known_tag_are_refused(ready):
    """A file that is not committed would not be in the release; a version is released once."""
    (ready / "new.py").touch()
    assert check(ready)[::2] == (2, "there are changes that are not committed: git status\n")
    (ready / "new.py").unlink()
    git(ready, "tag", "v1.2.0")
    assert check(ready)[::2] == (2, "the tag v1.2.0 is there already: raise the version\n")


def test_every_file_of_the_package_is_packaged():
    """Modules by their folder, others by a pattern of pyproject.toml. A file of a new kind would be missing from wheels."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fastppo"]
    package = ROOT / "fastppo"
    files = [path for path in package.rglob("*.*") if path.suffix not in (".pyc", ".bin")]
    assert len(files) > 100
    for file in files:
        if file.suffix == ".py":
            assert (file.parent / "__init__.py").exists(), file
        else:
            assert any(fnmatch.fnmatch(file.relative_to(package).as_posix(), pattern) for pattern in patterns), file


@pytest.mark.parametrize(("kernels", "system", "purely"), [("1", "linux", False), ("0", "linux", True), ("1", "win32", True)])
def test_which_systems_a_wheel_is_for(kernels, system, purely, monkeypatch):
    """One with compiled functions is for its platform and every Python; one without them for every system."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    from setuptools import Distribution

    asked = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FASTPPO_KERNELS", kernels)
    monkeypatch.setattr("setuptools.setup", lambda **settings: asked.update(settings))
    with monkeypatch.context() as pretended:
        pretended.setattr("sys.platform", system)
        runpy.run_path("setup.py")
    command = asked["cmdclass"]["bdist_wheel"](Distribution({"name": "fastppo", "ext_modules": asked["ext_modules"]}))
    command.ensure_finalized()
    python, abi, platform = command.get_tag()
    assert (python, abi, platform == "any") == ("py3", "none", purely)
