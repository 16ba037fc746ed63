"""How the vectorisation is chosen where the user leaves it open."""

import time

import gymnasium as gym
import pytest
from environments import Walk  # noqa: F401 (registers the environments)

from fastppo.envs.probe import ASYNC_OVERHEAD, choose_vectorization


class Slow(gym.Env):
    """Each step sleeps: N processes sleep at the same time."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, seconds=0.003):
        self.seconds = seconds

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        time.sleep(self.seconds)
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Slow-v0", Slow, disable_env_checker=True)


def test_a_vector_class_of_its_own_comes_first():
    """No trial where the environment brings its own vectorisation."""
    assert choose_vectorization("CartPole-v1", 8, "auto", {})[0] == "entry-point"


@pytest.mark.parametrize("wanted", ["sync", "async"])
def test_a_choice_is_obeyed(wanted):
    """--vectorization decides, without a trial."""
    assert choose_vectorization("Slow-v0", 4, wanted, {}) == (wanted, "as --vectorization asks")


def test_fast_environments_stay_in_one_process():
    """A step shorter than the cost of handing it over starts no process at all."""
    choice, why = choose_vectorization("Pendulum-v1", 2, "auto", {})
    assert choice == "sync"
    assert "ms" in why


def test_slow_environments_get_processes():
    """Eight sleeps at once are shorter than eight in a row."""
    assert ASYNC_OVERHEAD < 8 * 0.003
    assert choose_vectorization("Slow-v0", 8, "auto", {})[0] == "async"
    assert choose_vectorization("Slow-v0", 1, "auto", {})[0] == "sync"
