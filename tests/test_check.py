"""An environment is tried before training: each thing that can be wrong is named in one line, of the right degree; a sound

environment gives none, and trains to the same bits whether it was tried or not.
"""

import contextlib
import multiprocessing
import re
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import TAXI, AnySpaces
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from fastppo import TrainConfig, UsageError, train
from fastppo.envs import check_calls, check_trial
from fastppo.envs.check import Finding, check_envs, find, try_copy
from fastppo.envs.factory import EnvConfig, env_maker, make_envs, make_gymnasium_envs
from fastppo.train import console


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    """The check measures with the tests' clock."""
    monkeypatch.setattr(check_calls, "time", Clock)
    monkeypatch.setattr(check_trial, "time", Clock)


class Sound(gym.Env):
    """Observes two random numbers; five steps, each of which pays 1. Nothing is wrong with it."""

    observation_space, action_space = Box(-1.0, 1.0, (2,), np.float32), Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return self.obs(), {}

    def step(self, action):
        self.elapsed += 1
        return self.obs(), 1.0, self.elapsed == 5, False, {}

    def obs(self):
        return self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)


def observing(value, space=Sound.observation_space):
    """Sound, with another observation or space."""
    return type("Observing", (Sound,), {"observation_space": space, "obs": lambda self: value(Sound.obs(self))})


def stepping(change, sound=Sound):
    """Sound, whose step returns `change` of the five values."""
    return type("Stepping", (Sound,), {"step": lambda self, action: change(*sound.step(self, action))})


def resetting(reset):
    """Sound, with another reset."""
    return type("Resetting", (Sound,), {"reset": reset})


def _fail(self, **kwargs):
    raise RuntimeError("the wheel came off\nand rolled away")


def _fail_later(obs, *rest):
    if rest[1]:
        raise RuntimeError("the wheel came off at the end")
    return (obs, *rest)


def _without_options(self, *, seed=None):
    return Sound.reset(self, seed=seed)


def _of_the_clock(self, *, seed=None, options=None):
    return Sound.reset(self, seed=time.perf_counter_ns())


def _without_super(self, *, seed=None, options=None):
    self.elapsed, self._random = 0, np.random.default_rng(seed)
    return self.obs(), {}


class WithoutSuper(Sound):
    """Seeded, but by a generator that gymnasium does not know of."""

    reset = _without_super

    def obs(self):
        return self._random.uniform(-1.0, 1.0, 2).astype(np.float32)


class OneSeedForAll(Sound):
    """Each environment starts as all others do, and another time otherwise."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seed // 100)


class Jumpy(Sound):
    """What a step leads to is not the seed's to say."""

    def step(self, action):
        self.elapsed += 1
        return np.random.default_rng().uniform(-1.0, 1.0, 2).astype(np.float32), 1.0, self.elapsed == 5, False, {}


class NothingAllowed(Sound):
    """A mask without a legal action at the end, where there is none to choose, and after `never` steps."""

    never = 2

    observation_space = Dict(position=Sound.observation_space, action_mask=MultiBinary(3))

    def obs(self):
        mask = np.array([0, 1, 1], np.int8) * (self.elapsed not in (self.never, 5))
        return {"position": super().obs(), "action_mask": mask}


class Clock:
    """Stands in for `time` in the check: no time passes unless an environment says so, however busy the machine is."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now

    @classmethod
    def process_time(cls):
        return cls.now


class SlowResets(Sound):
    """0.05 s a reset: gymnasium's checker resets too often for that."""

    def reset(self, *, seed=None, options=None):
        Clock.now += 0.05
        return super().reset(seed=seed)


PAIR = Dict(a=Discrete(3), b=Sound.observation_space)
TWO = Tuple([Discrete(3), Sound.observation_space])
PIXELS = Box(0, 255, (2,), np.uint8)
ERRORS = {
    # what the calls are
    "reset raises": (resetting(_fail), "reset raised RuntimeError: the wheel came off (PLACE)"),
    "step raises": (stepping(lambda *five: 1 / 0), "step raised ZeroDivisionError: division by zero (PLACE)"),
    "a later step raises": (stepping(_fail_later), "step raised RuntimeError: the wheel came off at the end (PLACE)"),
    "reset without options": (
        resetting(_without_options),
        "reset raised TypeError: _without_options() got an unexpected keyword argument 'options' (PLACE); it has to be "
        "reset(self, *, seed=None, options=None) at PLACE",
    ),
    "reset returns the observation only": (
        resetting(lambda self, **kwargs: Sound.reset(self, **kwargs)[0]),
        "reset returned ndarray (2,) float32; it has to return two values, observation and info",
    ),
    "reset's info is none": (
        resetting(lambda self, **kwargs: (Sound.reset(self, **kwargs)[0], None)),
        "reset returned None as info; it has to be a dict, {} where it is empty",
    ),
    "step returns four values": (
        stepping(lambda obs, reward, terminated, truncated, info: (obs, reward, terminated, info)),
        "step returned 4 values; it has to return five: observation, reward, terminated, truncated, info",
    ),
    "step's info is a list": (
        stepping(lambda *five: (*five[:4], [])),
        "step returned a list as info; it has to be a dict, {} where it is empty",
    ),
    # observations
    "shape": (
        observing(lambda x: np.append(x, x[:1])),
        "observation has shape (3,); its space, Box(-1.0, 1.0, (2,), float32), says (2,)",
    ),
    "not finite": (observing(lambda x: x * np.nan), "observation is not finite (nan) after a reset"),
    "not finite after a step": (
        stepping(lambda obs, *rest: (np.abs(obs) / np.float32(0), *rest)),
        "observation is not finite (inf) after a step",
    ),
    "no numbers": (
        observing(lambda x: "left"),
        "observation is 'left'; its space is Box(-1.0, 1.0, (2,), float32)",
    ),
    "no dict": (observing(lambda x: x, PAIR), "observation is ndarray (2,) float32; its space is a Dict of a, b"),
    "a key is missing": (observing(lambda x: {"b": x}, PAIR), "observation has the keys b; its space is a Dict of a, b"),
    "in a dict": (
        observing(lambda x: {"a": 1, "b": x[:1]}, PAIR),
        "observation['b'] has shape (1,); its space, Box(-1.0, 1.0, (2,), float32), says (2,)",
    ),
    "too short a tuple": (observing(lambda x: (1,), TWO), "observation is 1 values; its space is a Tuple of 2"),
    "in a tuple": (observing(lambda x: (1, x * np.inf), TWO), "observation[1] is not finite (inf) after a reset"),
    "floats for whole numbers": (
        observing(lambda x: np.array([0.25, 1.0]), PIXELS),
        "observation is of type float64, which does not fit its space's uint8: convert it, or declare another",
    ),
    "whole numbers as floats": (
        observing(lambda x: np.array([3.0, 255.0]), PIXELS),
        "observation is of type float64, which does not fit its space's uint8: convert it, or declare another",
    ),
    # the rest of a step
    "no reward": (stepping(lambda obs, reward, *rest: (obs, None, *rest)), "reward is None, not a number"),
    "a reward in brackets": (
        stepping(lambda obs, reward, *rest: (obs, np.array([1.0]), *rest)),
        "reward has shape (1,); it has to be a number: --reward-weights 1 trains on the number in it",
    ),
    "an end in brackets": (
        stepping(lambda obs, reward, ended, *rest: (obs, reward, np.array([ended]), *rest)),
        "terminated has shape (1,); it has to be a bool",
    ),
    "two rewards": (
        stepping(lambda obs, reward, *rest: (obs, np.ones(2), *rest)),
        "reward has shape (2,); it has to be a number: --reward-weights 1 1 trains on the sum of its parts",
    ),
    "an infinite reward": (
        stepping(lambda obs, reward, *rest: (obs, -np.inf, *rest)),
        "reward is not finite (-inf) after a step",
    ),
    "terminated is none": (
        stepping(lambda obs, reward, ended, *rest: (obs, reward, None, *rest)),
        "terminated is None, not True or False",
    ),
    "truncated is two": (
        stepping(lambda obs, reward, ended, cut, info: (obs, reward, ended, 2, info)),
        "truncated is 2, not True or False",
    ),
}
WARNINGS = {
    "bounds": (
        observing(lambda x: x + np.float32([0, 4]) - x * np.float32([0, 1])),
        "observation is outside its space after a reset: 4, bounds -1 to 1",
    ),
    "another category": (
        observing(lambda x: 3, Discrete(3)),
        "observation is outside its space after a reset: 3, bounds 0 to 2",
    ),
    "another type": (
        observing(lambda x: x.astype(np.float64)),
        "observation is of type float64; its space says float32",
    ),
    "another seed": (
        resetting(_of_the_clock),
        "reset with the same seed twice gave two different first observations: runs cannot be repeated",
    ),
    "alike": (OneSeedForAll, "all 3 environments start alike whatever the seed: each needs random numbers of its own"),
    "terminated is a number": (
        stepping(lambda obs, reward, ended, *rest: (obs, reward, int(ended), *rest)),
        "terminated is 0; expected a bool",
    ),
    "nothing is legal": (NothingAllowed, "action_mask allows no action in the middle of an episode"),
    "slow": (SlowResets, "gymnasium's checker is left out: with 15 resets it would take "),
    # gymnasium's own
    "an unknown generator": (WithoutSuper, "gymnasium: Expects the random number generator to have been generated "),
    "random steps": (Jumpy, "gymnasium: Deterministic step observations are not equivalent for the same seed and action"),
}
BROKEN = {**ERRORS, **WARNINGS, "nothing is legal at the end": (type("AtTheEnd", (NothingAllowed,), {"never": 5}), "")}
gym.register("CheckedMasks-v0", entry_point=AnySpaces, disable_env_checker=True)
gym.register("Checked-v0", entry_point=lambda which=None: Sound() if which is None else BROKEN[which][0]())


def found(env_id, num_envs=3, vectorization="sync", **env_kwargs):
    """The findings, with the environments themselves as training has them."""
    config = EnvConfig(env_id, num_envs, vectorization, env_kwargs=env_kwargs)
    if vectorization != "entry-point":
        return list(try_copy(env_maker(config), num_envs).findings)
    with contextlib.closing(make_gymnasium_envs(config)) as envs:
        return find(envs, "gymnasium/entry-point")


@pytest.mark.parametrize("which", ERRORS)
def test_an_error(which):
    """One line, and nothing that follows from it."""
    (finding,) = found("Checked-v0", which=which)
    assert finding.is_error
    assert re.sub(r"[\w/]+\.py:\d+", "PLACE", finding.line) == ERRORS[which][1]


@pytest.mark.parametrize("which", WARNINGS)
def test_a_warning(which):
    """One line; what comes twice, in each step say, is told once."""
    (finding,) = found("Checked-v0", which=which)
    assert not finding.is_error
    assert finding.line.startswith(WARNINGS[which][1])
    assert "\x1b" not in finding.line
    assert "WARN" not in finding.line


# --- vector classes


class Sounds(SyncVectorEnv):
    """Sound environments in a class of their own, in a chosen mode, with `change` of what a step returns."""

    def __init__(self, num_envs, mode="NextStep", change=None, first=None):
        super().__init__([Sound] * num_envs, autoreset_mode=AutoresetMode(mode))
        self.change, self.first = change, first

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return (obs, info) if self.first is None else self.first(obs, info)

    def step(self, actions):
        five = super().step(actions)
        return five if self.change is None else self.change(*five)


class PaidForResetting(Sounds):
    """Says that the step after an end only resets, and pays in it."""

    def step(self, actions):
        obs, _, terminated, truncated, info = super().step(actions)
        return obs, np.ones(self.num_envs), terminated, truncated, info


class Others(SyncVectorEnv):
    """Of another environment, with a change of its observations."""

    def __init__(self, num_envs, env, change):
        super().__init__([env] * num_envs)
        self.change = change

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return self.change(obs), info

    def step(self, actions):
        obs, *rest = super().step(actions)
        return self.change(obs), *rest


VECTOR_ERRORS = {
    "shape": (
        lambda n: Sounds(n, first=lambda obs, info: (obs[:-1], info)),
        "observation has shape (2, 2); its space, Box(-1.0, 1.0, (2,), float32), says (3, 2)",
    ),
    "fractions": (
        lambda n: Others(n, observing(lambda x: np.array([3, 255], np.uint8), PIXELS), lambda obs: obs / 255),
        "observation is of type float64, which does not fit its space's uint8: convert it, or declare another",
    ),
    "info": (
        lambda n: Sounds(n, first=lambda obs, info: (obs, [info])),
        "reset returned a list as info; it has to be a dict, {} where it is empty",
    ),
    "four values": (
        lambda n: Sounds(n, change=lambda obs, reward, ended, cut, info: (obs, reward, ended | cut, info)),
        "step returned 4 values; it has to return five: observation, reward, terminated, truncated, info",
    ),
    "a column of rewards": (
        lambda n: Sounds(n, change=lambda obs, reward, *rest: (obs, reward[:, None], *rest)),
        "reward has shape (3, 1); it has to be (3,)",
    ),
    "one end for all": (
        lambda n: Sounds(n, change=lambda obs, reward, ended, *rest: (obs, reward, ended.any(), *rest)),
        "terminated has shape (); it has to be (3,)",
    ),
    "no final observation": (
        lambda n: Sounds(n, "SameStep", change=lambda *five: (*five[:4], {})),
        "environment 0: an episode ended and its final_obs is not in the info, as autoreset_mode SAME_STEP asks",
    ),
    "nan in a final observation": (
        lambda n: Sounds(n, "SameStep", change=lambda *five: (*five[:4], {"final_obs": list(five[0] * np.nan)})),
        "final observation is not finite (nan) at an end",
    ),
}
VECTOR_WARNINGS = {
    "bounds": (
        lambda n: Sounds(n, change=lambda obs, *rest: (obs * 0 - 3, *rest)),
        "observation is outside its space after a step: -3, bounds -1 to 1",
    ),
    "type": (
        lambda n: Sounds(n, change=lambda obs, *rest: (obs.astype(np.float64), *rest)),
        "observation is of type float64; its space says float32",
    ),
    "ends of numbers": (
        lambda n: Sounds(n, change=lambda *five: (*five[:3], five[3].astype(np.int8), five[4])),
        "truncated is ndarray (3,) int8; expected a bool",
    ),
    "seed": (
        lambda n: Sounds(n, first=lambda obs, info: (np.random.default_rng().uniform(-1, 1, obs.shape).astype("f"), info)),
        "reset with the same seed twice gave two different first observations: runs cannot be repeated",
    ),
    "alike": (
        lambda n: Sounds(n, first=lambda obs, info: (np.broadcast_to(obs[:1], obs.shape), info)),
        "all 3 environments start alike whatever the seed: each needs random numbers of its own",
    ),
    "whole numbers as floats": (
        lambda n: Others(n, observing(lambda x: np.array([3, 255], np.uint8), PIXELS), lambda obs: obs.astype(np.float64)),
        "observation is of type float64; its space says uint8",
    ),
    "paid for resetting": (
        PaidForResetting,
        "the step after an end paid a reward or ended again: with autoreset_mode NEXT_STEP it only resets, and is not learned "
        "from; declare metadata['autoreset_mode'] SAME_STEP or DISABLED if that is what the class does",
    ),
}
for _which, (_make, _) in {**VECTOR_ERRORS, **VECTOR_WARNINGS}.items():
    gym.register(f"CheckedVector-{_which.replace(' ', '-')}-v0", vector_entry_point=lambda num_envs, make=_make: make(num_envs))
gym.register("CheckedVector-v0", vector_entry_point=Sounds)


@pytest.mark.parametrize("which", [*VECTOR_ERRORS, *VECTOR_WARNINGS])
def test_a_vector_class(which):
    """What the class itself returns, for all environments at once."""
    is_error = which in VECTOR_ERRORS
    line = (VECTOR_ERRORS if is_error else VECTOR_WARNINGS)[which][1]
    env_id = f"CheckedVector-{which.replace(' ', '-')}-v0"
    (finding,) = found(env_id, vectorization="entry-point")
    assert (finding.line, finding.is_error) == (line, is_error)


class Tensors(VectorEnv):
    """Sounds, in tensors: takes no arrays."""

    def __init__(self, num_envs, spoil=None):
        self.sounds, self.spoil = Sounds(num_envs), spoil
        self.num_envs, self.metadata = num_envs, self.sounds.metadata
        self.single_observation_space, self.single_action_space = Sound.observation_space, Sound.action_space
        self.observation_space, self.action_space = self.sounds.observation_space, self.sounds.action_space
        self.buffer = torch.zeros(num_envs, 2)

    def reset(self, *, seed=None, options=None):
        seed = None if self.spoil == "seed" else seed
        return self._obs(self.sounds.reset(seed=seed)[0]), {}

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        assert actions.dtype is torch.int64
        obs, *rest, info = self.sounds.step(actions.numpy())
        reward, terminated, truncated = map(torch.from_numpy, rest)
        return self._obs(obs), (reward[:, None] if self.spoil == "reward" else reward).half(), terminated, truncated, info

    def _obs(self, obs):
        self.buffer.copy_(torch.from_numpy(obs))
        return self.buffer.double() if self.spoil == "double" else self.buffer


gym.register("CheckedTensors-v0", vector_entry_point=Tensors)


def test_tensors():
    """Looked at as arrays are, but of any type of floats; a buffer that the environment writes to again is not compared with

    itself.
    """
    assert found("CheckedTensors-v0", vectorization="entry-point") == []
    assert found("CheckedTensors-v0", vectorization="entry-point", spoil="double") == []
    (finding,) = found("CheckedTensors-v0", vectorization="entry-point", spoil="reward")
    assert finding == Finding("reward has shape (3, 1); it has to be (3,)", is_error=True)
    (finding,) = found("CheckedTensors-v0", vectorization="entry-point", spoil="seed")
    assert finding == Finding(WARNINGS["another seed"][1], is_error=False)


# --- sound environments

GYMNASIUMS = [
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    TAXI,
    "Blackjack-v1",
    "FrozenLake-v1",
]


@pytest.mark.parametrize("env_id", ["Checked-v0", *GYMNASIUMS])
def test_a_sound_environment(env_id, capfd):
    """Nothing is found, or printed."""
    assert found(env_id) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("env_id", "package"),
    [("LunarLander-v3", "Box2D"), ("BipedalWalker-v3", "Box2D"), ("HalfCheetah-v5", "mujoco"), ("Ant-v5", "mujoco")],
)
def test_a_sound_environment_of_a_package(env_id, package):
    """The same where the package is there."""
    pytest.importorskip(package)
    assert found(env_id) == []


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_a_sound_vector_class(mode):
    """Whichever way it resets itself."""
    assert found("CheckedVector-v0", vectorization="entry-point", mode=mode) == []
    assert found("environments:WalkVector-v0", vectorization="entry-point", mode=mode) == []


@pytest.mark.parametrize("mask", [None, "info", "tuple", "until the end", "method"])
@pytest.mark.parametrize("action", ["discrete", "discrete from -2", "multi-discrete 2-D"])
def test_masks_are_respected(action, mask):
    """AnySpaces raises for an illegal action; gymnasium's checker, which knows no masks, is kept from it."""
    if mask is not None:
        assert found("CheckedMasks-v0", action=action, mask=mask) == []
    assert found("environments:AnySpacesVector-v0", vectorization="entry-point", action=action, mask=mask) == []


@pytest.mark.parametrize("action", ["multi-binary 2-D", "box half-open", "box float64"])
@pytest.mark.parametrize("observation", ["nested", "tuple", "float16", "bool", "multi-discrete 2-D", "image (H, W)"])
def test_all_spaces(observation, action):
    """No false alarm for a space that training takes."""
    kwargs = {"observation": observation, "action": action}
    assert found("environments:AnySpacesVector-v0", vectorization="entry-point", **kwargs) == []


def test_a_mask_at_an_end():
    """Where an episode has ended there need be nothing legal."""
    assert found("Checked-v0", which="nothing is legal at the end") == []


def test_one_environment_and_a_coin(monkeypatch):
    """One environment cannot differ from another, and two that start by the toss of a coin are often alike."""
    assert found("Checked-v0", num_envs=1) == []
    for seed in range(8):
        monkeypatch.setattr(check_trial, "SEED", seed)
        assert found("environments:ProbeRewardIsObservation-v0") == []
    assert found("environments:ProbeConstantReward-v0") == []


@pytest.mark.parametrize(
    ("env_id", "backend", "package"),
    [
        ("CartPole-v1", "torch", "torch"),
        ("Pendulum-v1", "torch", "torch"),
        ("ALE/Breakout-v5", "gymnasium", "ale_py"),
        ("Breakout-v5", "envpool", "envpool"),
        ("LunarLander-v3", "envpool", "envpool"),
        ("CartPole-v1", "envpool", "envpool"),
    ],
)
@pytest.mark.long
def test_other_engines(env_id, backend, package):
    """Environments on the device, ALE's and EnvPool's."""
    pytest.importorskip(package)
    envs = make_envs(EnvConfig(env_id, 2, backend=backend))
    engine = "ale" if env_id.startswith("ALE/") else backend
    assert find(envs, engine) == []
    envs.close()


# --- as training uses it


def config(tmp_path, **settings):
    settings = {"num_envs": 4, "num_steps": 32, "num_iterations": 2, "eval_episodes": 0, "compile": "off", **settings}
    return TrainConfig(run_dir=str(tmp_path), **settings)


def test_errors_are_refused(tmp_path, capsys):
    """Exit code 2 and a line an error; nothing is written."""
    with pytest.raises(UsageError) as raised:
        train(config(tmp_path / "run", env_id="Checked-v0", env_kwargs={"which": "no reward"}))
    assert str(raised.value) == "--env-id Checked-v0: reward is None, not a number"
    flags = ["--env-id", "test_check:Checked-v0", "--env-kwargs", "which=a key is missing", "--run-dir", str(tmp_path / "run")]
    assert console(flags) == 2
    assert "observation has the keys b; its space is a Dict of a, b\n" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_several_errors():
    """A line each, those of warnings left for another time."""
    both = stepping(lambda obs, *rest: (obs + 9, "much", None, *rest[2:]))
    BROKEN["both"] = (both, "")
    config = EnvConfig("Checked-v0", 2, "sync", env_kwargs={"which": "both"})
    envs, tried = make_gymnasium_envs(config), try_copy(env_maker(config), 2)
    with pytest.raises(UsageError) as raised:
        check_envs(envs, "Checked-v0", "gymnasium/sync", tried=tried)
    first, second = str(raised.value).splitlines()
    assert first == "--env-id Checked-v0: reward is 'much', not a number"
    assert second == "--env-id Checked-v0: terminated is None, not True or False"


@pytest.mark.parametrize("which", ["terminated is none", "truncated is two"])
def test_the_way_round_an_error_is_told_where_there_is_one(which, tmp_path):
    """What the message says of --no-check-env is true: of these two errors, and of no other, since training would fault."""
    settings = {"env_id": "Checked-v0", "env_kwargs": {"which": which}}
    with pytest.raises(UsageError, match=r"\(--no-check-env trains all the same\)$"):
        train(config(tmp_path / "refused", **settings))
    train(config(tmp_path / "run", check_env=False, **settings))
    for other in ERRORS.keys() - {"terminated is none", "truncated is two"}:
        assert not any(finding.trains for finding in found("Checked-v0", which=other)), other


def test_warnings_are_told_once_and_training_goes_on(tmp_path, capsys):
    """A line that begins with "check:"; none on --resume, and none with --no-check-env."""
    flags = ["--env-id", "test_check:Checked-v0", "--num-envs", "4", "--num-steps", "32", "--eval-episodes", "0"]
    kwargs = ["--env-kwargs", "which=another type"]
    assert console([*flags, *kwargs, "--num-iterations", "1", "--run-dir", str(tmp_path / "run")]) == 0
    line = "check: observation is of type float64; its space says float32"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert console(["--resume", str(tmp_path / "run"), "--num-iterations", "2"]) == 0
    assert "\ncheck:" not in capsys.readouterr().out
    assert console([*flags, *kwargs, "--num-iterations", "1", "--no-check-env", "--run-dir", str(tmp_path / "other")]) == 0
    assert "\ncheck:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("env_id", "settings"),
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"backend": "torch"}),
        (
            "environments:RiseAndFall-v0",
            {"autoreset": "next-step"},
        ),  # counts its episodes, seeded or not; else the check chooses
        ("environments:MaskedIdentity-v0", {"vectorization": "grouped", "num_threads": 2}),
        ("environments:WalkVector-v0", {"env_kwargs": {"mode": "SameStep"}}),
        ("CheckedTensors-v0", {}),
    ],
)
def test_the_run_is_the_same_with_and_without(env_id, settings, tmp_path):
    """To the bit; and the check leaves no process behind, whoever steps the environments."""
    last = []
    for name, check_env in (("with", True), ("without", False)):
        train(config(tmp_path / name, env_id=env_id, check_env=check_env, **settings))
        last.append(torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True))
    for key, weight in last[0]["policy"]["weights"].items():
        assert torch.equal(weight, last[1]["policy"]["weights"][key]), key
    assert last[0]["global_step"] == last[1]["global_step"]
    assert not multiprocessing.active_children()


def test_a_slow_environment_is_not_waited_for(monkeypatch):
    """Steps end when the time is up: after one of two copies, which takes 0.12 s of the 0.1, and not after 32."""
    monkeypatch.setattr(check_trial, "SECONDS", 0.1)
    steps = []

    def slow(*five):
        steps.append(five)
        Clock.now += 0.06
        return five

    BROKEN["slow steps"] = (stepping(slow), "")
    (finding,) = found("Checked-v0", num_envs=8, which="slow steps")
    assert "gymnasium's checker is left out" in finding.line
    assert len(steps) == 2


def test_a_copy_that_cannot_be_made():
    """An environment that is there only once is trained on as it is, and the line says so."""
    BROKEN["only one"] = (lambda: 1 / 0, "")
    (finding,) = found("Checked-v0", which="only one")
    assert not finding.is_error
    assert re.sub(r"[\w/]+\.py:\d+", "PLACE", finding.line) == (
        "left out, since a copy of the environment to try out cannot be made: ZeroDivisionError: division by zero (PLACE)"
    )


def test_no_torch_is_imported():
    """`fastppo.envs.check` costs none, as the modules beside it."""
    code = "import sys, fastppo.envs.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
