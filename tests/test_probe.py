"""How the vectorisation is chosen where the user leaves it open."""

import contextlib
import multiprocessing
import os
import time
from types import SimpleNamespace

import gymnasium as gym
import pytest
from environments import Walk  # noqa: F401 (registers the environments)

from fastppo.envs.deadline import Deadline
from fastppo.envs.probe import ASYNC_FROM, GROUPED_FROM, PROBE_SECONDS, PROBE_STEPS, choose_vectorization, step_seconds
from fastppo.errors import UsageError
from fastppo.random_streams import Stream, environment_seed, seed_of


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


@pytest.mark.parametrize("wanted", ["sync", "grouped", "async"])
def test_a_choice_is_obeyed(wanted):
    """--vectorization decides, without a trial."""
    assert choose_vectorization("Slow-v0", 4, wanted, {}) == (wanted, "as --vectorization asks")


def of_steps(seconds, monkeypatch):
    """Trials are made and stepped as they are; each is said to take the next of `seconds`, busy machine or not.

    Returns a list of (seconds measured, child processes that are left) of each.
    """
    seconds, taken = list(seconds), []

    def timed(envs, deadline):
        measured = step_seconds(envs, deadline)
        taken.append((measured, len(multiprocessing.active_children())))
        return seconds.pop(0)

    monkeypatch.setattr("fastppo.envs.probe.step_seconds", timed)
    return taken


def test_fast_environments_stay_in_one_process(monkeypatch):
    """A step shorter than the cost of handing it over starts no process at all."""
    monkeypatch.setattr(multiprocessing.Process, "start", None)
    taken = of_steps([20e-6], monkeypatch)
    chosen = choose_vectorization("Pendulum-v1", 2, "auto", {}, num_threads=2)
    assert chosen == ("sync", "a step takes 0.02 ms, too little to share out")
    assert 0 < taken[0][0] < float("inf")


@pytest.mark.parametrize(("seconds", "choice"), [([0.024, 0.012, 0.003], "async"), ([0.012, 0.006, 0.008], "grouped")])
def test_slow_environments_get_processes(seconds, choice, monkeypatch):
    """Real processes step in the trials; each trial takes its processes with it, and the fastest kind is chosen."""
    taken = of_steps(seconds, monkeypatch)
    assert choose_vectorization("Slow-v0", 4, "auto", {"seconds": 0.0}, num_threads=2)[0] == choice
    assert len(taken) == 3
    assert all(0 < measured < float("inf") and children == 0 for measured, children in taken)
    assert gym.spec("Slow-v0").kwargs == {}


def test_one_environment_gets_no_process():
    """There is nothing to share out."""
    assert choose_vectorization("Slow-v0", 1, "auto", {})[0] == "sync"


FAILS, REFUSED = float("inf"), None
NEVER = 1.0


@pytest.mark.parametrize(
    ("sync", "grouped", "parallel", "choice", "reason"),
    [
        (0.99 * GROUPED_FROM, NEVER, NEVER, "sync", "a step takes 0.15 ms, too little to share out"),
        (GROUPED_FROM, 0.0, NEVER, "grouped", "a step takes 0.15 ms in one process, 0.00 ms in 2"),
        (0.001, 0.00089, NEVER, "grouped", "a step takes 1.00 ms in one process, 0.89 ms in 2"),
        (0.001, 0.00091, NEVER, "sync", "a step takes 1.00 ms in one process, 0.91 ms in 2"),
        (0.001, FAILS, NEVER, "sync", "a step takes 1.00 ms in one process, a trial in 2 failed"),
        (0.001, REFUSED, NEVER, "sync", "a step takes 1.00 ms in one process, a trial in 2 failed"),
        (0.99 * ASYNC_FROM, 0.003, NEVER, "grouped", "a step takes 4.95 ms in one process, 3.00 ms in 2"),
        (ASYNC_FROM, 0.003, 0.002, "async", "a step takes 5.00 ms in one process, 3.00 ms in 2, 2.00 ms in 4"),
        (0.010, 0.005, 0.006, "grouped", "a step takes 10.00 ms in one process, 5.00 ms in 2, 6.00 ms in 4"),
        (0.010, FAILS, 0.0089, "async", "a step takes 10.00 ms in one process, a trial in 2 failed, 8.90 ms in 4"),
        (0.010, 0.02, 0.0091, "sync", "a step takes 10.00 ms in one process, 20.00 ms in 2, 9.10 ms in 4"),
        (0.010, 0.005, REFUSED, "grouped", "a step takes 10.00 ms in one process, 5.00 ms in 2, a trial in 4 failed"),
        (FAILS, NEVER, NEVER, "sync", "a trial step failed"),
    ],
)
def test_what_is_chosen_from_times(monkeypatch, sync, grouped, parallel, choice, reason):
    """The fastest, where it saves a tenth and more; nothing is started for a step too short for it, or one that fails."""
    made = []

    def make(env_id, num_envs, vectorization, env_kwargs, num_threads, deadline):
        made.append(vectorization)
        seconds = {"sync": sync, "grouped": grouped, "async": parallel}[vectorization]
        if seconds is REFUSED:
            raise UsageError("no processes")
        return seconds, vectorization

    monkeypatch.setattr("fastppo.envs.probe.make_vec", make)
    monkeypatch.setattr("fastppo.envs.probe.step_seconds", lambda envs, deadline: envs)
    assert choose_vectorization("Slow-v0", 4, "auto", {}, num_threads=2) == (choice, reason)
    assert made == [kind for kind, seconds in (("sync", sync), ("grouped", grouped), ("async", parallel)) if seconds != NEVER]


def test_no_trial_on_one_core(monkeypatch):
    """Nothing to share out to, and nothing is made to find out."""
    monkeypatch.setattr("fastppo.envs.probe.make_vec", None)
    assert choose_vectorization("Slow-v0", 8, "auto", {}, num_threads=1) == ("sync", "one core")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert choose_vectorization("Slow-v0", 8, "auto", {}) == ("sync", "one core")


@pytest.mark.parametrize(("env_id", "num_envs", "choice"), [("CartPole-v1", 4, "entry-point"), ("Slow-v0", 1, "sync")])
def test_no_trial_without_a_choice(monkeypatch, env_id, num_envs, choice):
    """Nothing is made where there is nothing to choose from."""
    monkeypatch.setattr("fastppo.envs.probe.make_vec", None)
    assert choose_vectorization(env_id, num_envs, "auto", {})[0] == choice


class Trial:
    """Counts what is done to it; each step moves the clock on."""

    def __init__(self, seconds, fails=""):
        self.seconds, self.fails = seconds, fails
        self.actions, self.now, self.seed, self.closed = [], 100.0, None, False
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, seed):
        assert self.fails != "reset"
        self.seed, self.now = seed, self.now + 7.0  # a slow reset is no step

    def step(self, action):
        assert self.fails != "step"
        self.actions.append(int(action))
        self.now += self.seconds

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("seconds", "steps"), [(PROBE_SECONDS / 1024, PROBE_STEPS), (PROBE_SECONDS / 2, 2), (PROBE_SECONDS * 4, 1)]
)
def test_a_trial_is_short(monkeypatch, seconds, steps):
    """So many steps, or so many seconds, whichever comes first; the seconds of one of them come out of it."""
    trial = Trial(seconds)
    monkeypatch.setattr("fastppo.envs.probe.time", SimpleNamespace(perf_counter=lambda: trial.now))
    assert step_seconds(trial) == pytest.approx(seconds)
    assert (len(trial.actions), trial.closed) == (steps, True)
    assert trial.seed == environment_seed(0, Stream.PROBE_ENVIRONMENTS)
    space = gym.spaces.Discrete(2, seed=seed_of(0, Stream.PROBE_ACTIONS))
    assert trial.actions == [space.sample() for _ in range(steps)]  # the same each time


@pytest.mark.parametrize("fails", ["reset", "step"])
def test_a_trial_that_fails(fails):
    """It took forever, and is closed."""
    trial = Trial(0.0, fails)
    assert step_seconds(trial) == float("inf")
    assert trial.closed


def test_a_trial_that_hangs():
    """It took forever, but does not."""
    gym.register("Hangs-v0", lambda: Slow(600.0), disable_env_checker=True)
    with contextlib.closing(Deadline(1.0)) as deadline:
        choice = choose_vectorization("Hangs-v0", 2, "auto", {}, 2, deadline)
    assert choice == ("sync", "a trial step failed")
