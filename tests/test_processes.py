"""Environments that a process, a fork or a second copy is too much for: they train, or a line says what to do.

Random streams of processes, environments with processes of their own, those that may exist only once, how often environments
are made and reset, and scripts without a main guard.
"""

import contextlib
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Walk, WithProcess

from fastppo import UsageError, train
from fastppo.envs import check_trial, factory, group_process, grouped, streams
from fastppo.envs.check import try_copy
from fastppo.envs.deadline import Deadline
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.errors import ForkHangs
from fastppo.system import cpus
from support.processes import is_running
from support.runs import tiny

# --- processes of their own


def use_two_cores(monkeypatch):
    """As a process that may use two cores, whatever this machine has and conftest.py sets."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(cpus, "cpu_quota", lambda root: math.inf)


@pytest.mark.parametrize("daemon", [True, False])
def test_environments_may_start_processes(daemon):
    """In this process and in others; closing leaves none."""
    envs = GroupedVectorEnv([lambda: WithProcess(daemon)] * 3, 3)
    theirs = NumberedVectorEnv([Walk] * 3)
    np.testing.assert_array_equal(envs.reset(seed=1)[0], theirs.reset(seed=1)[0])
    np.testing.assert_array_equal(envs.step(np.ones(3, np.int64))[0], theirs.step(np.ones(3, np.int64))[0])
    assert not any(process.daemon for process in multiprocessing.active_children() if process.name.startswith("fastppo"))
    envs.close()
    assert not multiprocessing.active_children()


PARENT = """
import sys, time
sys.path[:0] = {path!r}
import multiprocessing
from environments import WithProcess
from fastppo.envs.grouped import GroupedVectorEnv

envs = GroupedVectorEnv([WithProcess] * 3, 3)
envs.reset(seed=0)
workers = [child.pid for child in multiprocessing.active_children() if child.name.startswith("fastppo")]
print("workers", *workers, flush=True)
if sys.argv[1] == "exit":
    sys.exit()  # without closing
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_nothing_stays_of_a_parent_that_is_gone(how):
    """Killed, or at its end without closing them: the processes are gone, and those that their environments have started."""
    script = PARENT.format(path=sys.path)
    parent = subprocess.Popen([sys.executable, "-c", script, how], stdout=subprocess.PIPE, text=True)
    started, line = [], []  # processes of environments, and ours
    try:
        while line[:1] != ["workers"]:
            started += map(int, line)
            line = parent.stdout.readline().split()
        workers = [int(pid) for pid in line[1:]]
        assert (len(started), len(workers)) == (3, 2)
        if how == "kill":
            parent.kill()
        parent.wait(timeout=60)
        left = 1 if how == "kill" else 0  # that of the environment in the killed process itself is its own affair
        until = time.monotonic() + 30
        while any(map(is_running, workers)) or sum(map(is_running, started)) > left:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pid in filter(is_running, started):
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_ended_takes_its_environments_processes_with_it(capfd):
    """One that hangs in a step is ended by force, and cannot close its environments."""

    class Hangs(WithProcess):
        def reset(self, **kwargs):
            time.sleep(600)

    envs = GroupedVectorEnv([Walk, Hangs], 2)
    for worker in envs._workers:
        worker.send(group_process.RESET, ([None, None], None))
    envs.close()
    (pid,) = map(int, capfd.readouterr().out.split())
    until = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < until
        time.sleep(0.05)


UNGUARDED = """
import sys
sys.path[:0] = {path!r}
from environments import Walk
from fastppo.envs import grouped
from fastppo.errors import UsageError

grouped.START_METHOD = "spawn"
try:
    grouped.GroupedVectorEnv([Walk] * 2, 2)
except UsageError as error:
    print(error)
"""


def test_a_script_without_a_main_guard(tmp_path):
    """Where processes import the script they cannot start others: said in a line, without a traceback."""
    (tmp_path / "script.py").write_text(UNGUARDED.format(path=sys.path))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True, timeout=120)
    assert 'put what it does under if __name__ == "__main__":, or use vectorization sync' in done.stdout
    assert done.stderr == ""


# --- threads that a fork does not have

POOL = ThreadPoolExecutor(1)


class Pooled(Walk):
    """Uses a thread pool of its module in each step."""

    def step(self, action):
        POOL.submit(len, "").result()
        return super().step(action)


class SlowToMake(Walk):
    """Computes longer than a process may hang."""

    def __init__(self):
        until = time.process_time() + 0.3
        while multiprocessing.parent_process() is not None and time.process_time() < until:
            pass


@pytest.fixture
def impatient(monkeypatch):
    """Forked processes are given up after a moment in which they compute nothing."""
    monkeypatch.setattr(grouped, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(grouped, "SLOWER", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_fork_that_hangs_is_told_within_seconds():
    """With what to do, and long before --env-timeout; one that computes is waited for."""
    POOL.submit(len, "").result()  # its thread runs, and no fork has it
    with contextlib.closing(Deadline(600.0)) as deadline:
        envs = GroupedVectorEnv([Pooled] * 2, 2, deadline)
        envs.reset(seed=0)
        with pytest.raises(ForkHangs, match=r"^environment 1: no answer .* use --vectorization sync$"):
            envs.step(np.ones(2, np.int64))
        GroupedVectorEnv([SlowToMake] * 2, 2, deadline).close()
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("impatient")
def test_an_evaluation_goes_on_in_one_process(tmp_path, capsys, monkeypatch):
    """Training in processes had started before the threads had, which its evaluation finds."""
    use_two_cores(monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "POOL", ThreadPoolExecutor(1))
    result = train(tiny(tmp_path / "run", env_id="InProcesses-v0", vectorization="grouped", check_env=False, eval_episodes=3))
    assert result.summary["eval_episodes"] == 3
    assert "the evaluation starts again in one process: environment 1: no answer" in capsys.readouterr().out


# --- random numbers


class OfGlobal(Walk):
    """Starts and goes on by a global generator: of "random", "np.random" or "torch", or a space of its class."""

    def __init__(self, which):
        self.which = which

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return self._obs(), {}

    def _obs(self):
        draws = {
            "random": lambda: [random.uniform(-1, 1) for _ in range(3)],
            "np.random": lambda: np.random.uniform(-1, 1, 3),
            "torch": lambda: torch.rand(3).numpy(),
            "space": self.observation_space.sample,
        }
        return np.asarray(draws[self.which](), np.float32)


KINDS = ["random", "np.random", "torch", "space"]


def first_observations(envs, seeds):
    """Of resets with each of the seeds and of two steps: (resets, N * 3, ...)."""
    rows = []
    for seed in seeds:
        rows.append(np.array(envs.reset(seed=seed)[0]))
        for _ in range(2):
            rows.append(np.array(envs.step(np.ones(envs.num_envs, np.int64))[0]))
    return np.concatenate(rows)


@pytest.mark.parametrize("num_groups", [2, 3, 6])
@pytest.mark.parametrize("which", KINDS)
def test_no_two_processes_have_one_stream(which, num_groups):
    """All observations of all environments differ, as in one process, and those of other processes are repeated by a seed."""
    OfGlobal.observation_space.sample()  # a fork copies its generator
    played = []
    for _ in range(2):
        envs = GroupedVectorEnv([lambda: OfGlobal(which)] * 6, num_groups)
        played.append(first_observations(envs, (5, 500)))
        envs.close()
        assert len(np.unique(played[-1], axis=0)) == len(played[-1])
    if which != "space":
        own = 6 // num_groups
        others = [observed.reshape(-1, 6, 3)[:, own:] for observed in played]
        np.testing.assert_array_equal(*others)


def test_the_users_generators_are_left_alone(tmp_path):
    """Whatever is tried before training puts them back: a run in one process goes on where the user's seeds stand."""
    before = streams.states_of_streams()
    for which in KINDS[:3]:
        try_copy(partial(gym.make, "OfGlobal-v0", which=which), 4)
        assert streams.moved_streams(before, streams.states_of_streams()) == []
    envs = GroupedVectorEnv([Walk] * 2, 2)
    envs.reset(seed=3)
    envs.close()
    assert streams.moved_streams(before, streams.states_of_streams()) == []


class Seeding(OfGlobal):
    """Seeds the generator that it draws from, so that runs can be repeated."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return super().reset(seed=seed)


@pytest.mark.parametrize("which", KINDS[:3])
def test_what_cannot_be_repeated_is_said(which):
    """The generator is named; not where the environment seeds it."""
    lines = [finding.line for finding in try_copy(partial(gym.make, "OfGlobal-v0", which=which), 2).findings]
    said = f"it draws from {which}, which --seed does not reach, so a run cannot be repeated: draw from self.np_random"
    assert lines == [said]
    assert not any("--seed" in finding.line for finding in try_copy(partial(gym.make, "Seeding-v0", which=which), 2).findings)


# --- how many there are


class Counted(Walk):
    """Counts what is made and reset, whichever process it is in: a byte each in two files."""

    path = ""

    def __init__(self):
        self._count("made")

    def reset(self, **kwargs):
        self._count("reset")
        time.sleep(0.01)
        return super().reset(**kwargs)

    def step(self, action):
        obs, reward, *_ = super().step(action)
        time.sleep(0.001)
        return obs, reward, False, False, {}

    def _count(self, what):
        with open(f"{self.path}.{what}", "ab") as file:
            file.write(b"1")


@pytest.mark.parametrize(
    ("vectorization", "num_seeds", "made", "resets"),
    [
        ("sync", 1, 9, 9),
        ("grouped", 1, 9, 9),
        ("async", 1, 9, 9),
        ("auto", 1, 9, 17),
        ("grouped", 2, 9, 9),
        ("auto", 2, 9, 17),
    ],
)
def test_environments_are_made_and_reset_once(vectorization, num_seeds, made, resets, tmp_path, monkeypatch):
    """Eight for training and a copy to try out, reset once where that is slow; of "auto" once more, in a trial of processes."""
    use_two_cores(monkeypatch)
    monkeypatch.setattr(check_trial, "SECONDS", 0.01)  # a reset of a hundredth of a second is slow
    monkeypatch.setattr(factory, "BETTER", 1e9)  # the trial is won, however busy the machine is
    monkeypatch.setattr(Counted, "path", str(tmp_path / "count"))
    settings = {"num_envs": 8 // num_seeds, "num_seeds": num_seeds, "num_steps": 2, "num_iterations": 1, "num_minibatches": 1}
    train(tiny(tmp_path / "run", env_id="Counted-v0", vectorization=vectorization, **settings))
    assert [(tmp_path / f"count.{what}").stat().st_size for what in ("made", "reset")] == [made, resets]


class Together(Walk):
    """Of a package with global state, as pygame's display: what one environment closes is closed for all that there are.

    There can be `most` of them at a time.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    opened, alive = 0, 0

    def __init__(self, most=99, render_mode=None):
        if Together.alive >= most:
            raise RuntimeError("no more of them")
        Together.alive += 1
        self.own, self.render_mode = Together.opened, render_mode

    def reset(self, **kwargs):
        assert self.own == Together.opened, "Surface is not initialized"
        return super().reset(**kwargs)

    def step(self, action):
        assert self.own == Together.opened, "Surface is not initialized"
        return super().step(action)

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        Together.opened += 1
        Together.alive -= 1


@pytest.mark.parametrize("vectorization", ["sync", "auto"])
def test_one_that_closes_for_all(vectorization, tmp_path, monkeypatch):
    """The check's copy, and the environment for videos, close nothing that the run needs; in the end all are closed."""
    use_two_cores(monkeypatch)
    monkeypatch.setattr(Together, "opened", 0)
    monkeypatch.setattr(Together, "alive", 0)
    result = train(tiny(tmp_path / "run", env_id="Together-v0", vectorization=vectorization, eval_episodes=2))
    assert result.summary["eval_episodes"] == 2
    assert Together.alive == 0
    train(tiny(tmp_path / "seen", env_id="Together-v0", vectorization=vectorization, record_every=2))
    assert len(list((tmp_path / "seen" / "videos").iterdir())) == 2
    assert Together.alive == 0


def test_as_many_as_there_can_be(tmp_path, monkeypatch):
    """A copy that was tried first makes room for the run's environments."""
    use_two_cores(monkeypatch)
    monkeypatch.setattr(Together, "opened", 0)
    monkeypatch.setattr(Together, "alive", 0)
    result = train(tiny(tmp_path / "run", env_id="Together-v0", env_kwargs={"most": 2}, vectorization="auto"))
    assert result.summary["backend"] == "gymnasium/sync"
    assert Together.alive == 0


class OnlyOne(Walk):
    """A licence for one simulator, which `close` gives back if `returned`."""

    alive = False

    def __init__(self, returned=True):
        if OnlyOne.alive:
            raise RuntimeError("one simulator at a time")
        OnlyOne.alive, self.returned = True, returned

    def close(self):
        OnlyOne.alive = not self.returned


@pytest.mark.parametrize(
    ("returned", "check_env", "episodes"), [(True, True, 3), (True, False, 3), (False, True, 3), (False, False, 0)]
)
def test_one_of_which_there_can_be_no_other(returned, check_env, episodes, tmp_path, capsys, monkeypatch):
    """It trains, and is evaluated after it was closed, or open as it is; where that is not to be had, a line says so."""
    monkeypatch.setattr(OnlyOne, "alive", False)
    settings = {"num_envs": 1, "num_minibatches": 1, "check_env": check_env, "eval_episodes": 3}
    result = train(tiny(tmp_path / "run", env_id="OnlyOne-v0", env_kwargs={"returned": returned}, **settings))
    assert result.summary["eval_episodes"] == episodes
    said = capsys.readouterr().out
    assert ("best.pt was not evaluated: --env-id OnlyOne-v0 cannot be made" in said) == (episodes == 0)
    assert ("check: left out" in said) == check_env


def test_what_was_made_is_closed_where_the_rest_cannot_be(monkeypatch):
    """Two at a time cannot be, and one can afterwards."""
    monkeypatch.setattr(OnlyOne, "alive", False)
    with pytest.raises(RuntimeError):
        NumberedVectorEnv([OnlyOne] * 2)
    NumberedVectorEnv([OnlyOne]).close()


# --- wrong in a wrapper


def recorded_twice():
    """gymnasium's own wrapper refuses that, without a word."""
    return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.RecordEpisodeStatistics(Walk()))


@pytest.mark.parametrize("check_env", [True, False])
def test_an_error_without_a_message_has_a_place(check_env, tmp_path):
    """File and line of what raised it, and what is written there, before training and in it."""
    error = UsageError if check_env else Exception
    with pytest.raises(error, match=r"AssertionError: assert .*_stats_key not in info \(gymnasium/wrappers/common.py:\d+\)"):
        train(tiny(tmp_path / "run", env_id="RecordedTwice-v0", check_env=check_env))


for _id, _entry in {
    "OfGlobal-v0": OfGlobal,
    "Seeding-v0": Seeding,
    "Counted-v0": Counted,
    "OnlyOne-v0": OnlyOne,
    "Together-v0": Together,
    "InProcesses-v0": Pooled,
    "RecordedTwice-v0": recorded_twice,
}.items():
    gym.register(_id, entry_point=_entry, disable_env_checker=True)
