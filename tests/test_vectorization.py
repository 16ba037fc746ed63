"""How the vectorisation is chosen where the user leaves it open."""

import contextlib
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from environments import Walk

from fastppo import train
from fastppo.envs import grouped
from fastppo.envs.check import Tried, try_copy
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.factory import (
    ASYNC_FROM,
    GROUPED_FROM,
    PROBE_SECONDS,
    PROBE_STEPS,
    EnvConfig,
    choose_vectorization,
    env_maker,
    start_alike,
    step_seconds,
)
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.errors import UsageError
from fastppo.random_streams import Stream, seed_of
from fastppo.training.opening import COPIED_GENERATOR
from support.runs import tiny


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


class Pooled(Slow):
    """Uses a thread pool of its module, whose thread no fork has."""

    pool = ThreadPoolExecutor(1)

    def step(self, action):
        self.pool.submit(len, "").result()
        return super().step(action)


gym.register("Slow-v0", Slow, disable_env_checker=True)
gym.register("Pooled-v0", Pooled, disable_env_checker=True)


def chosen(env_id, num_envs, wanted="auto", env_kwargs=None, num_threads=None, tried=None, deadline=NO_DEADLINE):
    """The choice, its environments closed. tried: seconds of a step and the share computed; None: those of a real copy."""
    copy = None if tried is None else partial(Tried, (), True, *tried)
    config = EnvConfig(env_id, num_envs, wanted, env_kwargs or {}, num_threads=num_threads)
    choice = choose_vectorization(config, deadline, copy)
    if isinstance(choice.envs, GroupedVectorEnv):
        assert choice.envs.num_envs == num_envs
        choice.envs.close()
    return choice


def no_trial():
    """For where none is to be made."""
    raise AssertionError


def test_a_vector_class_of_its_own_comes_first():
    """No trial where the environment brings its own vectorisation."""
    assert choose_vectorization(EnvConfig("CartPole-v1", 8), tried=no_trial).vectorization == "entry-point"


@pytest.mark.parametrize("wanted", ["sync", "grouped", "async"])
def test_a_choice_is_obeyed(wanted):
    """--vectorization decides, without a trial."""
    choice = choose_vectorization(EnvConfig("Slow-v0", 4, wanted), tried=no_trial)
    assert choice == (wanted, "as --vectorization asks", None)


def of_steps(seconds, monkeypatch):
    """Trials are made and stepped as they are; each is said to take the next of `seconds`, busy machine or not.

    Returns a list of (seconds measured, child processes that are left) of each.
    """
    seconds, taken = list(seconds), []

    def timed(envs, deadline):
        measured = step_seconds(envs, deadline)
        taken.append((measured, len(multiprocessing.active_children())))
        return seconds.pop(0)

    monkeypatch.setattr("fastppo.envs.factory.step_seconds", timed)
    return taken


def test_fast_environments_stay_in_one_process(monkeypatch):
    """A step shorter than the cost of handing it over starts no process at all."""
    monkeypatch.setattr(multiprocessing.Process, "start", None)
    choice = chosen("Pendulum-v1", 2, num_threads=2, tried=(GROUPED_FROM / 3, 1.0))
    assert choice.vectorization == "sync"
    assert "ms, too little to share out" in choice.reason


@pytest.mark.parametrize(("long", "choice"), [(ASYNC_FROM, "async"), (600.0, "grouped")])
def test_environments_that_wait_get_processes(monkeypatch, long, choice):
    """From a real copy on: a process each where a step waits long, else as many as cores; the trial's are those that train.

    What is measured in processes is not left to how busy this machine is.
    """
    monkeypatch.setattr("fastppo.envs.factory.ASYNC_FROM", long)
    monkeypatch.setattr("fastppo.envs.factory.step_seconds", lambda envs, deadline: 0.0)
    assert chosen("Slow-v0", 8, num_threads=2).vectorization == choice
    assert not multiprocessing.active_children()
    assert gym.spec("Slow-v0").kwargs == {}


def test_one_environment_gets_no_process():
    """There is nothing to share out."""
    assert chosen("Slow-v0", 1).vectorization == "sync"


def test_a_copy_tells_waiting_from_computing():
    """By the processor's time, which a busy machine does not change."""

    class Computes(Slow):
        def step(self, action):
            until = time.process_time() + 0.002
            while time.process_time() < until:
                pass
            return self.observation_space.sample(), 0.0, False, False, {}

    gym.register("Computes-v0", Computes, disable_env_checker=True)
    waits, computes = (try_copy(env_maker(EnvConfig(env_id)), 4) for env_id in ("Slow-v0", "Computes-v0"))
    assert waits.computing < 0.5
    assert waits.step_seconds >= 0.003
    assert computes.step_seconds >= 0.002
    assert computes.step_seconds * computes.computing >= 0.0019


FAILS, REFUSED = float("inf"), None
NEVER = 1.0


@pytest.mark.parametrize(
    ("sync", "computing", "kind", "taken", "choice", "reason"),
    [
        (0.99 * GROUPED_FROM, 1.0, None, NEVER, "sync", "a step takes 0.15 ms, too little to share out"),
        (GROUPED_FROM, 1.0, "grouped", 0.0, "grouped", "a step takes 0.15 ms in one process, 0.00 ms in 2"),
        (0.001, 1.0, "grouped", 0.00089, "grouped", "a step takes 1.00 ms in one process, 0.89 ms in 2"),
        (0.001, 1.0, "grouped", 0.00091, "sync", "a step takes 1.00 ms in one process, 0.91 ms in 2"),
        (0.001, 0.0, "grouped", 0.00089, "grouped", "a step takes 1.00 ms in one process, 0.89 ms in 2"),
        (0.001, 1.0, "grouped", FAILS, "sync", "a step takes 1.00 ms in one process; those of a trial in 2 failed"),
        (0.001, 1.0, "grouped", REFUSED, "sync", "a step takes 1.00 ms in one process; those of a trial in 2 failed"),
        (0.99 * ASYNC_FROM, 0.1, "grouped", 0.003, "grouped", "a step takes 4.95 ms in one process, 3.00 ms in 2"),
        (ASYNC_FROM, 0.6, "grouped", 0.003, "grouped", "a step takes 5.00 ms in one process, 3.00 ms in 2"),
        (ASYNC_FROM, 0.4, "async", 0.002, "async", "a step takes 5.00 ms in one process, 2.00 ms in 4"),
        (0.010, 0.0, "async", 0.0091, "sync", "a step takes 10.00 ms in one process, 9.10 ms in 4"),
        (FAILS, 1.0, None, NEVER, "sync", "a trial step failed"),
    ],
)
def test_what_is_chosen_from_times(monkeypatch, sync, computing, kind, taken, choice, reason):
    """Processes where they save a tenth and more: one each for environments that wait; none for a step too short for it.

    The environments of a trial are made once: those that train, or closed.
    """
    made, closed = [], []

    def make(config, deadline, is_trial):
        assert is_trial
        made.append(config.vectorization)
        if taken is REFUSED:
            raise UsageError("no processes")
        return SimpleNamespace(close=lambda: closed.append(config.vectorization))

    def seconds(envs, deadline):
        if taken is FAILS:
            raise ValueError
        return taken

    monkeypatch.setattr("fastppo.envs.factory.make_gymnasium_envs", make)
    monkeypatch.setattr("fastppo.envs.factory.start_alike", lambda *_: False)
    monkeypatch.setattr("fastppo.envs.factory.step_seconds", seconds)
    found = chosen("Slow-v0", 4, num_threads=2, tried=(sync / 4, computing))
    assert found[:2] == (choice, reason)
    assert made == ([] if kind is None else [kind])
    assert (found.envs is not None) == (choice != "sync")
    assert closed == ([] if found.envs is not None or taken is REFUSED else made)


def test_no_trial_on_one_core(monkeypatch):
    """Nothing to share out to, and nothing is made to find out."""
    monkeypatch.setattr("fastppo.envs.factory.make_gymnasium_envs", None)
    assert choose_vectorization(EnvConfig("Slow-v0", 8, num_threads=1), tried=no_trial)[:2] == ("sync", "one core")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert choose_vectorization(EnvConfig("Slow-v0", 8), tried=no_trial)[:2] == ("sync", "one core")


@pytest.mark.parametrize(("env_id", "num_envs", "choice"), [("CartPole-v1", 4, "entry-point"), ("Slow-v0", 1, "sync")])
def test_no_trial_without_a_choice(monkeypatch, env_id, num_envs, choice):
    """Nothing is made where there is nothing to choose from."""
    monkeypatch.setattr("fastppo.envs.factory.make_gymnasium_envs", None)
    assert choose_vectorization(EnvConfig(env_id, num_envs), tried=no_trial).vectorization == choice


class Trial:
    """Counts what is done to it; each step moves the clock on."""

    def __init__(self, seconds):
        self.seconds, self.actions, self.now = seconds, [], 100.0
        self.action_space = gym.spaces.Discrete(2)

    def step(self, action):
        self.actions.append(int(action))
        self.now += self.seconds


@pytest.mark.parametrize(
    ("seconds", "steps"), [(PROBE_SECONDS / 1024, PROBE_STEPS), (PROBE_SECONDS / 2, 2), (PROBE_SECONDS * 4, 1)]
)
def test_a_trial_is_short(monkeypatch, seconds, steps):
    """So many steps, or so many seconds, whichever comes first; the seconds of one of them come out of it."""
    trial = Trial(seconds)
    monkeypatch.setattr("fastppo.envs.factory.time", SimpleNamespace(perf_counter=lambda: trial.now))
    assert step_seconds(trial) == pytest.approx(seconds)
    assert len(trial.actions) == steps
    space = gym.spaces.Discrete(2, seed=seed_of(0, Stream.PROBE_ACTIONS))
    assert trial.actions == [space.sample() for _ in range(steps)]  # the same each time


def test_a_trial_that_hangs():
    """One process, and the environments are tried no further."""
    gym.register("Hangs-v0", lambda: Slow(600.0), disable_env_checker=True)
    with contextlib.closing(Deadline(0.3)) as deadline:
        choice = chosen("Hangs-v0", 2, num_threads=2, deadline=deadline)
    assert choice == ("sync", "a trial step failed", None)


def test_a_fork_that_hangs_is_a_reason_for_one_process(monkeypatch):
    """A thread pool of the module's, which a copy has started: said in a line within seconds, not after --env-timeout."""
    monkeypatch.setattr(grouped, "TRIAL_HANG_SECONDS", 0.2)
    monkeypatch.setattr(grouped, "SLOWER", 1.0)
    with contextlib.closing(Deadline(600.0)) as deadline:
        choice = chosen("Pooled-v0", 4, num_threads=2, deadline=deadline)
    assert any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate())
    assert choice.vectorization == "sync"
    assert "a fork has none of the threads" in choice.reason
    assert not multiprocessing.active_children()


GENERATOR = np.random.default_rng()


class OfTheModule(Slow):
    """Draws from a generator that a fork copies and no reset seeds."""

    def reset(self, **kwargs):
        return GENERATOR.uniform(-1, 1, 2).astype(np.float32), {}


@pytest.mark.parametrize(("env_fn", "alike"), [(OfTheModule, True), (Walk, False)])
@pytest.mark.parametrize(("num_envs", "num_groups", "size"), [(4, 2, 2), (5, 3, 2), (3, 3, 1)])
def test_copied_generators_are_noticed(env_fn, alike, num_envs, num_groups, size):
    """Environments of two processes that start alike in every reset, where starts vary, are no independent ones."""
    envs = GroupedVectorEnv([env_fn] * num_envs, num_groups)
    assert start_alike(envs, size, varies=True) == alike
    assert not start_alike(envs, size, varies=False)
    envs.close()


def test_a_generator_that_processes_may_copy_is_told(tmp_path, capsys):
    """Where processes were asked for, they are kept, and a line says what they may have in common; one has nothing to say."""
    gym.register("OfTheModule-v0", OfTheModule, kwargs={"seconds": 0.0}, disable_env_checker=True)
    settings = {"num_envs": 4, "num_threads": 2}
    for vectorization, number in (("grouped", 1), ("async", 1), ("sync", 0)):
        train(tiny(tmp_path / vectorization, env_id="OfTheModule-v0", vectorization=vectorization, **settings))
        assert capsys.readouterr().out.splitlines().count(COPIED_GENERATOR) == number
    train(tiny(tmp_path / "walk", env_id="environments:Walk-v0", vectorization="grouped", **settings))
    assert COPIED_GENERATOR not in capsys.readouterr().out
