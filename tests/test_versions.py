"""What fastppo asks of gymnasium is there in the oldest version that pyproject.toml declares; see scripts/test_oldest.sh."""

import ast
import os
import subprocess
import sys
import tomllib
from array import typecodes
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from environments import OBSERVATIONS, Walk
from gymnasium.spaces import Box, Dict, Tuple

import fastppo
from fastppo.envs.check_calls import CallChecker, CheckedEnv
from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.envs.shared_rows import allocated_space
from fastppo.system.requirements import OLDEST

GENERIC_IN_THE_OLDEST = {"Env", "Wrapper", "VectorEnv", "Space"}
HALF = Box(-1, 1, (3,), np.float16)


def subscripted(path):
    """Names of classes of gymnasium that take arguments in brackets when the module at `path` runs; texts are not run."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gymnasium")]
    imported = {alias.name for node in imports for alias in node.names}
    for node in nodes:
        of = node.value if isinstance(node, ast.Subscript) else None
        if isinstance(of, ast.Attribute) and ast.unparse(of).startswith("gym."):
            yield of.attr
        elif isinstance(of, ast.Name) and of.id in imported:
            yield of.id


def test_no_class_takes_type_arguments_that_the_oldest_does_not():
    """gymnasium 1.1 to 1.3: "SyncVectorEnv is not a generic class" when the module is imported."""
    found = {name for path in Path(fastppo.__file__).parent.rglob("*.py") for name in subscripted(path)}
    assert found
    assert found <= GENERIC_IN_THE_OLDEST


@pytest.mark.parametrize(
    "wrapped",
    [lambda: NumberedVectorEnv([Walk]).envs[0], lambda: CheckedEnv(Walk(), CallChecker(Walk().observation_space, ()))],
)
def test_metadata_of_a_class_is_never_written_to(wrapped):
    """Before 1.4 SyncVectorEnv writes its autoreset mode into the metadata of its first environment."""
    env = wrapped()
    env.metadata["autoreset_mode"] = "written"
    assert env.unwrapped.metadata is not env.metadata
    assert "written" not in gym.Env.metadata.values()


def leaves(space):
    if isinstance(space, Dict | Tuple):
        for part in space.spaces.values() if isinstance(space, Dict) else space.spaces:
            yield from leaves(part)
    else:
        yield space


@pytest.mark.parametrize("space", [HALF, Dict(a=Tuple([HALF])), *OBSERVATIONS.values()])
def test_shared_memory_is_of_types_that_the_oldest_allocates(space):
    """Before 1.4 create_shared_memory knows the types of Python's arrays only, which float16 is none of. The size stays."""
    allocated = allocated_space(space)
    for ours, theirs in zip(leaves(allocated), leaves(space), strict=True):
        assert ours.dtype.char in f"?{typecodes}"
        assert (ours.shape, ours.dtype.itemsize) == (theirs.shape, theirs.dtype.itemsize)


@pytest.fixture
def old_gymnasium(tmp_path):
    """A folder with the metadata of gymnasium 0.29.1, which stands before the installed one."""
    metadata = tmp_path / "gymnasium-0.29.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: gymnasium\nVersion: 0.29.1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "code", "lines"),
    [
        (["-m", "fastppo", "train", "--help"], 2, 1),
        (["-m", "fastppo.evaluate", "runs/x"], 2, 1),
        (["-c", "import fastppo"], 1, None),
    ],
)
def test_an_older_gymnasium_is_one_line(words, code, lines, old_gymnasium):
    """Packages of environments bring it. A command says so without a traceback; an import raises an ImportError."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(old_gymnasium), str(Path(fastppo.__file__).parent.parent)])}
    done = subprocess.run([sys.executable, *words], cwd=old_gymnasium, env=env, capture_output=True, text=True, timeout=60)
    told = done.stderr.splitlines()
    assert done.returncode == code
    assert "fastppo needs gymnasium 1.1 or newer, and 0.29.1 is installed: pip install 'gymnasium>=1.1'" in told[-1]
    assert lines is None or len(told) == lines


def test_the_oldest_gymnasium_is_the_declared_one():
    """Of pyproject.toml."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert f"gymnasium[classic-control]>={OLDEST[0]}.{OLDEST[1]}" in project["dependencies"]
