"""Groups of environments in processes of their own. Oracle: gymnasium's SyncVectorEnv, bit for bit."""

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from environments import Fragile, Walk
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Text, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, train
from fastppo.envs import group_process, grouped
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import Deadline
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs, num_processes
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.errors import EnvironmentFailed, UsageError
from fastppo.system.cpus import available_cores
from fastppo.train import console
from support.processes import is_running

HANGS = 600.0  # seconds that an environment sleeps
SOON = HANGS / 2  # what waits for it takes longer, and nothing else does however busy the machine is


class Nested(gym.Env):
    """Observations and actions of every kind that arrays hold; the reward comes from the action before, which is kept."""

    observation_space = Dict(
        position=Box(-1.0, 1.0, (2, 3), np.float32),
        image=Box(0, 255, (2, 2), np.uint8),
        inner=Tuple([Discrete(5), Dict(bits=MultiBinary(3), half=Box(-1, 1, (1,), np.float16))]),
    )
    action_space = Dict(push=Box(-1.0, 1.0, (2,), np.float32), turn=Tuple([Discrete(3)]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space = Nested.observation_space
        self.left, self.last = int(self.np_random.integers(1, 5)), None
        self.options = options or {}
        return self._obs(), {}

    def step(self, action):
        self.left -= 1
        reward = 0.0 if self.last is None else float(self.last["push"].sum()) + float(self.last["turn"][0])
        self.last = action
        return self._obs(), reward + self.options.get("bonus", 0.0), self.left == 0, False, {"unread": self.left}

    def _obs(self):
        random = self.np_random
        return {
            "position": random.uniform(-1, 1, (2, 3)).astype(np.float32),
            "image": random.integers(0, 256, (2, 2)).astype(np.uint8),
            "inner": (
                random.integers(5),
                {"bits": random.integers(0, 2, 3).astype(np.int8), "half": random.uniform(-1, 1, 1).astype(np.float16)},
            ),
        }


class Masked(Walk):
    """Walks that tell now and then, as the seed has it, which actions are legal."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed)
        return obs, self._told()

    def step(self, action):
        *step, _ = super().step(action)
        return *step, self._told()

    def _told(self):
        mask = self.np_random.integers(0, 2, 3).astype(np.int8)
        return {"action_mask": mask, "unread": 1} if self.np_random.uniform() < 0.3 else {}


class Misbehaving(Walk):
    """Does something in its third step, or in a reset, where the options say so."""

    def reset(self, *, seed=None, options=None):
        self.told = options or {}
        if self.told.get("in_reset"):
            self._misbehave()
        return super().reset(seed=seed)

    def step(self, action):
        if self.elapsed >= 2 or (self.told and self.elapsed + 1 == self.length):
            self._misbehave()
        return super().step(action)

    def _misbehave(self):
        how = self.told.get("how")
        if how == "raise":
            raise ValueError("the wheel came off\nand another line")
        if how == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(HANGS)
        if how == "exit":
            sys.exit(7)


def flat(batch):
    """Arrays of a nested batch, copied."""
    if isinstance(batch, dict):
        return [array for name in sorted(batch) for array in flat(batch[name])]
    return [array for part in batch for array in flat(part)] if isinstance(batch, tuple) else [np.array(batch)]


def played(envs, steps, seed=3, options=None):
    """All that N environments tell from a reset on, and after another without a seed: lists of arrays, and infos."""
    envs.action_space.seed(seed)
    told = []
    for reset_seed in (seed, None):
        obs, info = envs.reset(seed=reset_seed, options=options)
        told.append((flat(obs), info))
        for _ in range(steps):
            obs, *numbers, info = envs.step(envs.action_space.sample())
            told.append((flat((obs, *numbers)), info))
    envs.close()
    return told


def assert_equal(ours, theirs):
    """Bit for bit, dtypes too; infos as far as they are read."""
    assert len(ours) == len(theirs)
    for (arrays, info), (expected, all_infos) in zip(ours, theirs, strict=True):
        read = {key: all_infos[key] for key in all_infos if key.removeprefix("_") == "action_mask"}
        assert info.keys() == read.keys()
        pairs = [*zip(arrays, expected, strict=True), *((info[key], read[key]) for key in read)]
        for mine, other in pairs:
            assert mine.dtype == other.dtype
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("num_envs", [1, 2, 5, 8])
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_walks_are_those_of_one_process(num_envs, num_groups):
    """Same seed, same bits, over many ends of both kinds, whatever the groups; a reset without seed goes on."""
    groups = min(num_groups, num_envs)
    envs = GroupedVectorEnv([Walk] * num_envs, groups)
    assert len(multiprocessing.active_children()) == groups - 1
    assert AutoresetEnvs(envs).mode is AutoresetMode.NEXT_STEP
    theirs = played(SyncVectorEnv([Walk] * num_envs), 60)
    assert_equal(played(envs, 60), theirs)
    ends = np.sum([arrays[2] | arrays[3] for arrays, _ in theirs if len(arrays) > 1], axis=0)
    assert (ends > 5).all()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_groups", [0, 1, 2, 3])
@pytest.mark.parametrize("env_fn", [Nested, Masked])
def test_nested_spaces_masks_and_kept_actions(env_fn, num_groups):
    """Dict and Tuple of every dtype arrive, and options; infos as SyncVectorEnv has them; a kept action is not written to.

    0 groups: as --vectorization sync has it.
    """
    options = {"bonus": 0.5} if env_fn is Nested else None
    theirs = played(SyncVectorEnv([env_fn] * 5), 40, options=options)
    ours = GroupedVectorEnv([env_fn] * 5, num_groups) if num_groups else NumberedVectorEnv([env_fn] * 5)
    assert_equal(played(ours, 40, options=options), theirs)
    if env_fn is Masked:
        told = [frozenset(info) for _, info in theirs]
        assert len(set(told)) > 1  # with and without


def test_a_list_of_seeds_and_other_dtypes():
    """As SyncVectorEnv takes seeds; actions are the space's, whatever integers they come as."""
    ours, theirs = GroupedVectorEnv([Walk] * 5, 2), SyncVectorEnv([Walk] * 5)
    seeds = [4, 8, 15, 16, 23]
    np.testing.assert_array_equal(ours.reset(seed=seeds)[0], theirs.reset(seed=seeds)[0])
    actions = np.array([0, 1, 2, 1, 0], np.int32)
    np.testing.assert_array_equal(ours.step(actions)[0], theirs.step(actions)[0])
    with pytest.raises(ValueError, match="5"):
        ours.step(np.zeros(4, np.int64))
    ours.close()
    theirs.close()


def test_started_afresh_instead_of_forked(monkeypatch):
    """Where a fork is not to be had the processes import what they need."""
    monkeypatch.setattr(grouped, "START_METHOD", "spawn")
    assert_equal(played(GroupedVectorEnv([Walk] * 3, 2), 10), played(SyncVectorEnv([Walk] * 3), 10))


def test_one_batch_that_is_reused():
    """No copies: the caller makes them. Infos that nobody reads do not travel."""
    envs = GroupedVectorEnv([Nested] * 3, 2)
    first = envs.reset(seed=0)[0]
    second, *_, info = envs.step(envs.action_space.sample())
    assert all(np.shares_memory(mine, other) for mine, other in zip([first["position"]], [second["position"]], strict=True))
    assert info == {}
    envs.close()


@pytest.mark.parametrize(("vectorization", "processes"), [("sync", 0), ("grouped", 1), ("async", 4)])
def test_every_vectorization_is_the_same_engine(vectorization, processes):
    """Its processes, beside this one; the environments are those of gymnasium's own making, bit for bit, and as they were."""
    envs = make_gymnasium_envs(EnvConfig("environments:Walk-v1", 5, vectorization, num_threads=2))
    theirs = gym.make_vec("environments:Walk-v1", 5, vectorization_mode="sync")
    assert isinstance(envs, GroupedVectorEnv) == (vectorization != "sync")
    assert len(multiprocessing.active_children()) == processes
    for name in ("num_envs", "single_observation_space", "observation_space", "single_action_space", "action_space"):
        assert getattr(envs, name) == getattr(theirs, name), name
    assert (envs.metadata, envs.render_mode) == (theirs.metadata, theirs.render_mode)
    assert_equal(played(envs, 30), played(theirs, 30))
    assert not multiprocessing.active_children()


def test_made_by_its_name():
    """--vectorization grouped: as many processes as --num-threads or cores, and environments."""
    cores = available_cores()
    assert [num_processes(8, None), num_processes(8, 1), num_processes(8, 3), num_processes(2, 5)] == [min(8, cores), 1, 3, 2]
    envs = make_gymnasium_envs(EnvConfig("environments:Walk-v0", 3, "grouped", num_threads=2))
    assert (type(envs), envs.num_envs, len(multiprocessing.active_children())) == (GroupedVectorEnv, 3, 1)
    theirs = make_gymnasium_envs(EnvConfig("environments:Walk-v0", 3, "sync"))
    assert_equal(played(envs, 10), played(theirs, 10))


@pytest.mark.parametrize("space", ["observation_space", "action_space"])
def test_spaces_without_arrays_are_refused(space, monkeypatch):
    """Named, with the flag and what is supported; no process stays."""
    monkeypatch.setattr(Walk, space, Text(3))
    with pytest.raises(UsageError, match=r"--vectorization grouped and async .*Text.*supported: Box"):
        GroupedVectorEnv([Walk] * 2, 2)
    assert not multiprocessing.active_children()


def test_environments_that_cannot_be_made():
    """In this process the error as it is, in another one by name; and all must have the spaces of the first."""
    with pytest.raises(TypeError, match="where"):
        GroupedVectorEnv([Fragile, Walk], 2)
    with pytest.raises(EnvironmentFailed, match=r"^environment 2: TypeError: .*where"):
        GroupedVectorEnv([Walk, Walk, Fragile], 2)
    with pytest.raises(EnvironmentFailed, match=r"^environment 2: other spaces"):
        GroupedVectorEnv([Walk, Walk, partial(Fragile, "never")], 2)
    with pytest.raises(UsageError, match=r"--env-kwargs do not fit environments:Fragile-v0.*where"):
        make_gymnasium_envs(EnvConfig("environments:Fragile-v0", 3, "grouped", num_threads=2))
    assert not multiprocessing.active_children()


class NeverMade(Walk):
    def __init__(self):
        time.sleep(HANGS)


def test_environments_that_are_never_made():
    """Named, in this process and in another one, and all are gone."""
    with contextlib.closing(Deadline(1.0)) as deadline:  # enough for starting a process on a busy machine
        for envs in ([Walk, NeverMade, Walk, Walk], [Walk, Walk, Walk, NeverMade]):
            number = envs.index(NeverMade)
            with pytest.raises(EnvironmentFailed, match=rf"^environment {number}: no answer for 1 s"), deadline:
                GroupedVectorEnv(envs, 2, deadline)
            assert not multiprocessing.active_children()


def play_on(envs, options):
    """A reset and steps, until something goes wrong."""
    envs.reset(options=options)
    for _ in range(100):
        envs.step(np.ones(envs.num_envs, np.int64))


def fails(envs, options):
    """The error of a reset with `options` or of one of the steps after it. No environment that hangs is waited for."""
    started = time.monotonic()
    with pytest.raises(EnvironmentFailed) as error:
        play_on(envs, options)
    assert not multiprocessing.active_children()
    assert envs.closed
    with pytest.raises(EnvironmentFailed) as again:  # whoever goes on is told the same
        envs.step(np.ones(envs.num_envs, np.int64))
    assert again.value is error.value
    assert time.monotonic() - started < SOON
    return error.value


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("number", [1, 4])
def test_an_environment_that_raises(number, where, capfd):
    """In this process or another: named by its number, type and message in one line, nothing on stderr, the others gone."""
    envs = GroupedVectorEnv([Misbehaving if i == number else Walk for i in range(5)], 2)
    envs.reset(seed=0)
    error = fails(envs, {"how": "raise", "in_reset": where == "reset"})
    assert re.fullmatch(rf"environment {number}: ValueError: the wheel came off \(test_grouped.py:\d+\)", str(error))
    traceback = "".join(getattr(error, "__notes__", [])) + repr(error.__cause__)
    assert "and another line" in traceback
    assert capfd.readouterr() == ("", "")


def test_a_process_that_is_killed():
    """Noticed and named, before a step and in the middle of one."""
    envs = GroupedVectorEnv([Walk] * 5, 2)
    envs.reset(seed=0)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    assert str(fails(envs, None)) == "environments 3 to 4: the process was killed by signal 9"

    envs = GroupedVectorEnv([Walk, Walk, Misbehaving], 2)
    killer = threading.Timer(0.3, os.kill, (multiprocessing.active_children()[0].pid, signal.SIGKILL))
    killer.start()
    assert str(fails(envs, {"how": "hang", "in_reset": True})) == "environment 2: the process was killed by signal 9"


def test_a_process_that_ends_itself(capfd):
    """An environment that exits is a fault like any other."""
    error = fails(GroupedVectorEnv([Walk, Misbehaving], 2), {"how": "exit", "in_reset": True})
    assert re.fullmatch(r"environment 1: SystemExit: 7 \(test_grouped.py:\d+\)", str(error))
    assert capfd.readouterr() == ("", "")


def test_close_does_not_wait_for_a_step_that_hangs():
    """A fault elsewhere ends a process in the middle of a step, even one that heeds no signal; closing twice is nothing."""
    envs = GroupedVectorEnv([Misbehaving] * 2, 2)

    def raises(*, seed, options):
        time.sleep(0.3)
        raise ValueError("now")

    envs._group.envs[0].env.reset = raises
    error = fails(envs, {"how": "hang", "in_reset": True})
    assert str(error).startswith("environment 0: ValueError: now (test_grouped.py:")
    envs.close()


def test_an_environment_that_fails_to_close():
    """Its error arrives, and the processes are gone all the same."""
    envs = GroupedVectorEnv([Walk] * 3, 2)
    envs._group.envs[0].env.close = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        envs.close()
    assert not multiprocessing.active_children()


def test_closed_at_once(monkeypatch):
    """Processes that wait for a command end by themselves when they are told to close: none has to be killed."""
    for side in (grouped, group_process):
        monkeypatch.setattr(side, "CLOSE_SECONDS", SOON)
    monkeypatch.setattr(multiprocessing.Process, "kill", None)
    envs = GroupedVectorEnv([Walk] * 8, 3)
    envs.close()
    envs.close()
    assert not multiprocessing.active_children()
    with pytest.raises(gym.error.ClosedEnvironmentError):
        envs.reset()


PARENT = """
import multiprocessing, sys, time
from environments import Walk
from fastppo.envs.grouped import GroupedVectorEnv

class Hangs(Walk):
    def reset(self, **kwargs):
        time.sleep(600)

envs = GroupedVectorEnv([Walk, Walk, Hangs if sys.argv[1] == "hang" else Walk], 3)
print(*(process.pid for process in multiprocessing.active_children()), flush=True)
envs.reset()
time.sleep(600)
"""


@pytest.mark.parametrize("doing", ["wait", "hang"])
def test_processes_end_with_their_parent(doing):
    """Killed without a chance to close them, they are gone in a moment: those that wait, and one that hangs in a step."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, doing], stdout=subprocess.PIPE, text=True, env=environment)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    try:
        assert len(pids) == 2
        time.sleep(0.5)
        for pid in pids:
            os.kill(pid, signal.SIGINT)  # control-C is the parent's: they go on
        time.sleep(0.2)
        assert all(map(is_running, pids))
        parent.kill()
        deadline = time.monotonic() + SOON
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not any(map(is_running, pids))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


STOPPED = """
import contextlib, multiprocessing, time
import numpy as np
from environments import Walk
from fastppo.envs.deadline import Deadline
from fastppo.envs.grouped import GroupedVectorEnv

class Slow(Walk):
    def step(self, action):
        time.sleep(0.6)
        return super().step(action)

with contextlib.closing(Deadline(1.0)) as deadline, contextlib.closing(GroupedVectorEnv([Slow] * 2, 2, deadline)) as envs:
    with deadline:
        envs.reset()
    print("in a step", flush=True)
    with deadline:
        envs.step(np.ones(2, np.int64))
    print("done", flush=True)
"""


@pytest.mark.long
def test_processes_that_are_stopped_for_longer_than_the_limit():
    """Ctrl-Z stops all of them, fg lets them go on: they do, since no environment has hung."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", STOPPED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as parent:
        assert parent.stdout.readline() == "in a step\n"
        time.sleep(0.1)
        os.killpg(parent.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.killpg(parent.pid, signal.SIGCONT)
        assert parent.stdout.read() == "done\n"
    assert parent.returncode == 0


USES_TORCH = """
import numpy as np, torch
from environments import Walk
from fastppo.envs.grouped import GroupedVectorEnv

class Model(Walk):
    def step(self, action):
        torch.rand(2_000_000).exp_()
        return super().step(action)

torch.set_num_threads(2)
torch.rand(2_000_000).exp_()  # starts a thread, which no fork will have
envs = GroupedVectorEnv([Model] * 2, 2)
envs.reset(seed=0)
envs.step(np.ones(2, np.int64))
envs.close()
"""


@pytest.mark.long
def test_environments_that_use_torch():
    """A model of the world in torch does not hang: after a fork OpenMP has no threads, and would wait for them forever."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", USES_TORCH], check=True, timeout=SOON, env=environment)


TINY = {"num_envs": 4, "num_steps": 32, "num_iterations": 3, "eval_episodes": 3, "compile": "off", "plain": True}


@pytest.fixture
def three_cores(monkeypatch):
    """To share environments out to, whatever this machine has: --num-threads would give torch as many threads too."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    monkeypatch.setattr("fastppo.system.cpus.cpu_quota", lambda root: 3.0)
    monkeypatch.delenv("OMP_NUM_THREADS")


def test_a_run_equals_that_of_one_process(tmp_path, three_cores):
    """From Python: the same weights and evaluation, however the environments are shared out; no process stays."""
    weights, means = [], []
    for vectorization in ("sync", "grouped", "async"):
        config = TrainConfig(
            env_id="environments:Walk-v0",
            vectorization=vectorization,
            run_dir=str(tmp_path / vectorization),
            **TINY,
        )
        result = train(config)
        assert result.summary["backend"] == f"gymnasium/{vectorization}"
        weights.append(result.policy.params.numpy())
        means.append(result.summary["eval_return_mean"])
        assert not multiprocessing.active_children()
    for others in (1, 2):
        np.testing.assert_array_equal(weights[0], weights[others])
    assert means[0] == means[1] == means[2]


def test_a_fault_as_the_user_sees_it(tmp_path, capfd, three_cores):
    """Exit code 3 and a line that names environment, type and message; the traceback is in the run directory."""
    flags = ["--num-envs", "4", "--num-steps", "32", "--env-id", "environments:Fragile-v0", "--env-kwargs", "where=step"]
    flags += ["--vectorization", "grouped", "--no-check-env", "--run-dir", str(tmp_path / "run")]
    assert console(flags) == 3
    error = capfd.readouterr().err
    assert "an environment failed in step 9 of the rollout" in error
    assert "environment 0: RuntimeError: the wheel came off" in error
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 2
    assert not multiprocessing.active_children()
