"""Run directories to damage, and how a refusal reads. A plugin of conftest.py, for its fixtures."""

import hashlib
import json
import os
import shutil
import zipfile

import hypothesis
import pytest

from fastppo import UsageError
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.train import console

st = hypothesis.strategies
TINY = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--num-iterations", "2", "--eval-episodes", "0"]
TINY += ["--hidden-sizes", "8", "--norm-obs", "--norm-reward", "--preset", "none"]


def digest(directory):
    """Everything in a directory: names, links and contents."""
    found = {}
    for path in sorted(directory.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else ""
        data = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (kind, hashlib.sha256(data).hexdigest())
    return found


def refused(load, *words):
    """`load` ends in a UsageError of one or two lines, of letters that a terminal shows as they are, with these words."""
    with pytest.raises(UsageError) as caught:
        load()
    message = str(caught.value)
    assert len(message.splitlines()) <= 2, message
    assert len(message) < 600, message
    for word in words:
        assert word in message, message


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with each entry as `change` of its name and data has it, checksums right."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def put(value, *keys):
    """A change of one place in a checkpoint."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        if value is KeyError:
            del state[keys[-1]]
        else:
            state[keys[-1]] = value(state[keys[-1]]) if callable(value) else value

    return change


WEIGHT = ("weights", "actor.0.weight")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def edit_config(directory, **settings):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def linked(target):
    def link(path):
        path.unlink()
        path.symlink_to(target)

    return link


def directory(path):
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory):
    """A run with statistics, to copy and damage."""
    run_dir = tmp_path_factory.mktemp("hostile") / "run"
    assert console([*TINY, "--run-dir", str(run_dir)]) == 0
    for kept in (run_dir / "checkpoints").glob("iteration-*.pt"):  # a damaged last.pt is the only one there is
        kept.unlink()
    return run_dir


@pytest.fixture
def run_dir(hostile_run, tmp_path):
    """A copy of it: tmp_path / "run"."""
    shutil.copytree(hostile_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="session")
def original(hostile_run, tmp_path_factory):
    """A checkpoint's bytes, what is in it, and a place to put changed ones."""
    path = hostile_run / "checkpoints" / "best.pt"
    return path.read_bytes(), load_checkpoint(path), tmp_path_factory.mktemp("flips") / "best.pt"
