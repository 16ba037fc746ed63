"""For all tests: one CPU thread (two of them on a busy machine wait for each other, and here they sleep meanwhile), a compile
cache of their own, runs without a picture, and the same random numbers in every run.
"""

import gc
import importlib.util
import os
import random
import sys
from pathlib import Path

# Read when torch is loaded. Two threads of each of two test processes share two cores: one that spins while it waits takes the
# core from the one it waits for, and a sum of 64 numbers takes 4 ms.
os.environ["OMP_WAIT_POLICY"] = "passive"

import hypothesis
import numpy as np
import pytest
import torch

from fastppo.compile import native
from fastppo.errors import naming_flags

pytest.register_assert_rewrite("support")
pytest_plugins = ["support.fake_hub", "support.hostile"]  # fixtures of several files

sys.path.insert(0, str(Path(__file__).parent / "support"))  # for ids such as environments:Walk-v0, in child processes too
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
for name in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "TERM", "PYTHONWARNINGS", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)  # what is printed, and whether a warning is an error, does not depend on who runs the tests

# Generators without a seed, gymnasium's among them, ask numpy for the system's entropy. Here they get numbers that depend on
# the test alone. A forked process gets others than its parent, and than the next one.
entropy = random.Random(0)
np.random.bit_generator.randbits = entropy.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=entropy.random, after_in_child=lambda: entropy.seed(f"child {entropy.random()}"))

# Messages are read as the command line prints them, with flags; test_messages.py has them as Python's callers get them.
flags_named = naming_flags()
flags_named.__enter__()

# Hypothesis tries the same examples in every run, and does not mind how long one takes.
hypothesis.settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before a test's fixtures: every global generator starts anew, whichever tests ran before."""
    entropy.seed(item.nodeid)
    random.seed(item.nodeid)
    np.random.seed(entropy.getrandbits(32))
    torch.manual_seed(entropy.getrandbits(63))


# The files that take longest, the longest first: workers take a file at a time, and a long one at the end would keep the
# others waiting. xdist's own order is by numbers of tests and has the files that compile last.
LONG_FILES = ["export", "fake_gpu", "halves", "selector", "video", "atari", "masks", "sweep", "seeds", "env_faults", "startup"]
LONG_FILES += ["plot", "faults", "cuda_graph", "factory", "resume", "torchrun", "compilation", "rnn_compile"]


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    """The long files first, all else in its order, as scripts/test.sh tells xdist. Users of `inductor` are marked."""
    order = {f"test_{name}": index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if "inductor" in item.fixturenames:
            item.add_marker("compiles")


def pytest_collection_finish(session):
    """What is there now stays to the end: looking through a million objects takes a test that collects garbage a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def needs_compiler():
    """For tests that build programs: they are skipped where there is no C++ compiler, and fail there in CI."""
    if not native.has_compiler():
        (pytest.fail if os.environ.get("FASTPPO_REQUIRE_COMPILER") else pytest.skip)(native.NO_COMPILER)


@pytest.fixture(scope="session")
def inductor(needs_compiler):
    """For tests that let Inductor build programs, seconds to a minute each. They are marked `compiles`, and run apart."""


@pytest.fixture(scope="session")
def programs_dir(tmp_path_factory):
    """A cache of compiled programs for all workers: the library of the helpers is built once, not once a test file."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory, programs_dir):
    """Nothing is loaded from, or left in, the user's cache of programs. The fused ones are built once for all tests."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    from support.kernels import share_kernels  # here: assertions in `support` are rewritten before it is imported

    share_kernels(programs_dir)


@pytest.fixture(autouse=True, scope="session")
def _no_pictures():
    """Of all runs of this process, see support.runs."""
    from support.runs import spare_pictures

    with pytest.MonkeyPatch.context() as patched:
        spare_pictures(patched.setattr)
        yield


@pytest.fixture(scope="module")
def benchmark_script(request):
    """The benchmark that the test file names as SCRIPT, as a module."""
    path = request.module.SCRIPT
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # as for a script: it may import its neighbours
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[path.stem]
