"""Compiled programs for observations of any kind, masks, and own networks: equal to eager, each with a cache key of its own.

A file of its own: what it imports, tests/test_compilation.py shows a second process not to need.
"""

import os
import subprocess
import sys

import gymnasium as gym
import pytest
import torch
from composites import SPACES
from environments import ACTIONS

from fastppo.compile.inductor import compile_program
from fastppo.compile.key import cache_key
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from support.networks import Relu, Small, structured_job
from support.programs import assert_same


@pytest.fixture(autouse=True)
def _one_thread():
    """A program is compiled for a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # half a minute of compiling each: below they are compared as the compiler is given them
@pytest.mark.parametrize(
    ("observation", "action", "policy"),
    [
        ("tuple", ACTIONS["multi-discrete"], None),
        ("image (H, W, C)", gym.spaces.Discrete(3), None),
        ("float64", ACTIONS["box"], Small),
        ("float32", SPACES["hybrid"], None),
    ],
    ids=["structure with an image", "image", "own network", "parts of an action"],
)
def test_compiled_learn_equals_eager_for(observation, action, policy, tmp_path):
    """Pixels as bytes through the convolutions, beside numbers and choices; somebody's module with a log standard deviation

    and a constant of its own.
    """
    tmp_path.chmod(0o700)
    learn_eagerly, arguments = structured_job(observation, action, policy, microbatch_size=8)
    compiled = compile_program(learn_eagerly, arguments, tmp_path)
    for seed in (0, 1):
        _, arguments = structured_job(observation, action, policy, seed)
        assert_same(compiled(*arguments), learn_eagerly(*arguments))


@pytest.mark.parametrize(
    ("observation", "action", "policy"),
    [
        ("nested", ACTIONS["multi-discrete"], None),
        ("tuple", ACTIONS["multi-discrete"], None),
        ("masked", ACTIONS["multi-discrete"], None),
        ("float64", ACTIONS["box"], Small),
        ("float32", SPACES["hybrid"], None),
        ("float32", SPACES["hybrid"], Small),
    ],
    ids=["nested", "structure with an image", "masked", "own network", "parts of an action", "parts and own network"],
)
@pytest.mark.long
def test_traced_program_equals_eager_for(observation, action, policy):
    """As the compiler is given it: leaves of all kinds, in an order that both sides agree on; somebody's module."""
    learn_eagerly, arguments = structured_job(observation, action, policy)
    graph, _ = trace(learn_eagerly, arguments)
    params, *rest = graph(*flat_tensors(arguments))
    expected = learn_eagerly(*arguments)
    torch.testing.assert_close(params, expected.params, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(rest[3], expected.minibatch_metrics, rtol=2e-4, atol=2e-5)


def test_two_networks_of_the_same_shapes_share_no_program(tmp_path):
    """Another activation or constant is another program, whatever the class is called; other first weights are not."""
    renamed = type("Small", (Relu,), {"__qualname__": Small.__qualname__, "__module__": Small.__module__})

    def key(policy, **settings):
        return cache_key(*structured_job("float32", gym.spaces.Discrete(3), policy, **settings))

    assert key(Small) == key(Small) == key(Small, network_seed=5)
    keys = [key(Small), key(Relu), key(renamed), key(lambda inputs, n: Small(inputs, n, shift=0.5)), key(None)]
    assert len(set(keys)) == len(keys)


@pytest.mark.long
def test_a_network_of_ones_own_has_its_program_in_another_process():
    """No address, no order of a set in its key."""
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "import gymnasium as gym; from fastppo.compile.key import cache_key; from support.networks import *\n"
        "print(cache_key(*structured_job('float32', gym.spaces.Discrete(3), Small)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == cache_key(*structured_job("float32", gym.spaces.Discrete(3), Small))
