"""Tiny environments whose right answers are known. Importing this module registers them; it knows nothing of fastppo.

Their ids work as `environments:Id-v0` wherever tests/support is on the path (conftest.py puts it there).
"""

import contextlib
import copy
import itertools
import multiprocessing
import os
import signal
import sys
import time

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Walk(gym.Env):
    """Everything an episode does follows from the seed and the actions: its length of 1 to 7 steps, and how it ends."""

    observation_space = Box(-10.0, 10.0, (3,), np.float32)
    action_space = Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(1, 8))
        self.truncates = bool(self.np_random.integers(2))
        self.position = self.np_random.uniform(-1.0, 1.0)
        self.elapsed = 0
        return self._obs(), {}

    def step(self, action):
        self.elapsed += 1
        self.position = 0.9 * self.position + 0.3 * (int(action) - 1)
        ended = self.elapsed == self.length
        return self._obs(), 1.0 + self.position, ended and not self.truncates, ended and self.truncates, {}

    def _obs(self):
        return np.array([self.position, self.elapsed / 8, self.length / 8], np.float32)


class WalkVector(SyncVectorEnv):
    """Walks in a chosen autoreset mode; with `bribe`, the reset-only step of next-step mode pays that much."""

    def __init__(self, num_envs, mode="NextStep", bribe=0.0):
        super().__init__([Walk] * num_envs, autoreset_mode=AutoresetMode(mode))
        self.bribe = bribe
        self.ended = np.zeros(num_envs, bool)

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        reward = reward + self.bribe * self.ended
        self.ended = terminated | truncated
        return obs, reward, terminated, truncated, info


class FaultyVector(SyncVectorEnv):
    """Walks of which environment `index` fails in vector step `at`, as long as the file `marker` exists.

    kind: "obs" or "reward" become nan, "raise" raises with a message of `lines` lines, "hang" does not return.
    """

    def __init__(self, num_envs, kind, index, at, marker, lines=1):
        super().__init__([Walk] * num_envs)
        self.kind, self.index, self.at, self.marker, self.lines = kind, index, at, marker, lines
        self.steps = 0

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions)
        if self.steps == self.at and os.path.exists(self.marker):
            if self.kind == "raise":
                raise RuntimeError("\n".join(["the wheel came off", *["and another line"] * (self.lines - 1)]))
            if self.kind == "hang":
                time.sleep(600)
            (obs if self.kind == "obs" else reward)[self.index] = np.nan
        self.steps += 1
        return obs, reward, terminated, truncated, info


class WithProcess(Walk):
    """Walks with a process of its own, whose id it prints; `close` ends it."""

    def __init__(self, daemon=True):
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_echo, args=(other,), daemon=daemon)
        self.process.start()
        os.write(1, f"{self.process.pid}\n".encode())  # at once, whoever else writes

    def step(self, action):
        self.pipe.send(1.5)
        assert self.pipe.recv() == 1.5
        return super().step(action)

    def close(self):
        self.pipe.send(None)
        self.process.join()


def _echo(pipe):
    while (said := pipe.recv()) is not None:
        pipe.send(said)


class Fragile(gym.Env):
    """Fails where it is told to: in "reset", in "step", or by a first observation that is "nan"."""

    observation_space = Box(-10.0, 10.0, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, where):
        self.where = where
        self.elapsed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.where == "reset":
            raise RuntimeError("the wheel came off")
        return np.full(2, np.nan if self.where == "nan" else 0.0, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        if self.where == "step" and self.elapsed == 10:
            raise RuntimeError("the wheel came off")
        return np.zeros(2, np.float32), 1.0, False, False, {}


class Failing(gym.Env):
    """Never ends, until the one that was reset with `seed` fails, in its step `at`; in that reset itself where that is -1.

    Where that is -2 all fail in being made.

    how: "raise" two lines, and "raise-twice", in closing too; "hang" in a call that waits, "hang-twice" in closing too,
    "hang-stubbornly" in one that is tried again whatever it raises, "hang-in-c"; "exit"; "die", of a signal.
    """

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, seed, at, how):
        self.seed, self.at, self.how = seed, at, how
        self.failing = at == -2
        self._fail()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.failing, self.elapsed = seed == self.seed, 0
        if self.at == -1:
            self._fail()
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if self.elapsed == self.at:
            self._fail()
        self.elapsed += 1
        return np.zeros(2, np.float32), 1.0, False, False, {}

    def close(self):
        if self.how.endswith("-twice"):
            self._fail()

    def _fail(self):
        if not self.failing:
            return
        if self.how.startswith("raise"):
            raise ValueError("the wheel came off\nand another line")
        if self.how in ("hang", "hang-twice"):
            time.sleep(600)
        if self.how == "hang-stubbornly":
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(600)
        if self.how == "hang-in-c":
            sum(itertools.repeat(0))
        if self.how == "exit":
            sys.exit(7)
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)


class Lengths(gym.Env):
    """Half of the episodes last 1 step and half 25, as the seed has it; each step pays 1, so the return is the length."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([1, 25]))
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 1.0, self.left == 0, False, {}


class Recorder(gym.Env):
    """Keeps the actions it is given in `received`; episodes of 5 steps, observations of the space it is made with."""

    def __init__(self, observation_space=None, action_space=None):
        self.observation_space = observation_space or Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = action_space or Discrete(2)
        self.received = []
        self.elapsed = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.elapsed = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.received.append(np.array(action))
        self.elapsed += 1
        return self.observation_space.sample(), 0.0, self.elapsed == 5, False, {}


class Spaces(Recorder):
    """Spaces that the trainer does not take: which = "action", "integer-action", "text-obs" or "nested-obs"."""

    def __init__(self, which):
        number = Box(-1.0, 1.0, (2,), np.float32)
        super().__init__(
            {"text-obs": Text(3), "nested-obs": Dict(position=number, inner=Tuple([Graph(number, None)]))}.get(which, number),
            {"action": Text(3), "integer-action": Box(0, 5, (1,), np.int64)}.get(which, Discrete(2)),
        )


TAXI = next(env_id for env_id in ("Taxi-v4", "Taxi-v3") if env_id in gym.registry)  # v4 came with gymnasium 1.4
VECTOR = Box(-10.0, 10.0, (3,), np.float32)
OBSERVATIONS = {
    "float32": VECTOR,
    "float64": Box(-np.inf, np.inf, (3,), np.float64),
    "float16": Box(-1.0, 1.0, (2,), np.float16),
    "int32": Box(-70_000, 70_000, (3,), np.int32),
    "uint16": Box(0, 65_535, (3,), np.uint16),
    "bool": Box(0, 1, (5,), np.bool_),
    "bytes": Box(0, 255, (6,), np.uint8),
    "matrix": Box(-1.0, 1.0, (3, 4), np.float32),
    "scalar": Box(-1.0, 1.0, (), np.float32),
    "discrete": Discrete(5, start=-2),
    "multi-discrete": MultiDiscrete([2, 4, 3], start=[1, -1, 0]),
    "multi-discrete 2-D": MultiDiscrete([[2, 3], [4, 2]]),
    "multi-binary": MultiBinary(4),
    "multi-binary 2-D": MultiBinary((2, 3)),
    "image (C, H, W)": Box(0, 255, (2, 40, 44), np.uint8),
    "image (H, W, C)": Box(0, 255, (40, 44, 3), np.uint8),
    "image (H, W)": Box(0, 255, (36, 40), np.uint8),
    "nested": Dict(
        {
            "z": VECTOR,
            "a": Tuple([Discrete(3), Dict({"obs": MultiBinary(2), "7": Box(0, 255, (2,), np.uint8)})]),
            "obs": Box(-5, 5, (2, 2), np.int64),
            "with.dot": Discrete(2, start=1),
        }
    ),
    "tuple": Tuple([Box(0, 255, (36, 36), np.uint8), Tuple([MultiDiscrete([3, 2]), VECTOR])]),
    "masked": Dict({"position": VECTOR, "action_mask": Box(0, 1, (5,), np.int8), "also": Discrete(4)}),
}
ACTIONS = {
    "discrete": Discrete(3),
    "discrete from -2": Discrete(3, start=-2),
    "multi-discrete": MultiDiscrete([2, 3]),
    "multi-discrete 2-D": MultiDiscrete([[2, 3, 1], [4, 2, 2]], start=[[0, 5, -1], [0, -3, 1]]),
    "multi-discrete int32": MultiDiscrete(np.array([3, 3], np.int32), dtype=np.int32),
    "three bits": MultiDiscrete([2, 2, 2]),
    "multi-binary": MultiBinary(3),
    "multi-binary 2-D": MultiBinary((2, 2)),
    "box": Box(-0.1, 0.3, (2,), np.float32),
    "box half-open": Box(np.array([0.0, -np.inf], np.float32), np.array([np.inf, 1.0], np.float32)),
    "box scalar": Box(-1.0, 1.0, (), np.float32),
    "box matrix": Box(-1.0, 2.0, (2, 2), np.float32),
    "box float64": Box(-0.1, 0.7, (2,), np.float64),
    "box float16": Box(-0.1, 0.7, (2,), np.float16),
}


class AnySpaces(gym.Env):
    """Observations drawn from a space of OBSERVATIONS, episodes of 1 to 7 steps that end in both ways, all as the seed has it.

    It raises for an action that is not in its space of ACTIONS or of another type, and for one that is illegal where it tells
    a mask. mask: "info", "tuple" (of an array for each component); "until the end", not in the last step of an episode, and so
    "method" (`action_masks()`); or only "sometimes", after a "reset", after a "step". With an observation space that has one,
    it is told there. `observed` and `masks` keep what it told.
    """

    def __init__(self, observation="float32", action="discrete", mask=None):
        self.observation_space, self.action_space = copy.deepcopy((OBSERVATIONS[observation], ACTIONS[action]))
        space = self.action_space
        self.numbers = [int(n) for n in np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))]
        self.mask = mask
        if mask == "method":
            self.action_masks = lambda: np.concatenate(self.legal)
        self.observed, self.masks, self.received = [], [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.length, self.truncates = int(self.np_random.integers(1, 8)), bool(self.np_random.integers(2))
        self.elapsed = 0
        return self._told()

    def step(self, action):
        given, space = np.asarray(action), self.action_space
        assert given.shape == space.shape, given
        assert given.dtype == space.dtype, given.dtype
        assert space.contains(given[()] if isinstance(space, Discrete) else given), given
        chosen = np.ravel(given - getattr(space, "start", 0)) if self.numbers else np.ravel(given)
        self.received.append(given)
        if self.legal is not None:
            assert all(part[k] for part, k in zip(self.legal, chosen, strict=True)), f"{given} is illegal: {self.legal}"
        self.elapsed += 1
        ended = self.elapsed == self.length
        return self._told(float(chosen.sum()), ended and not self.truncates, ended and self.truncates)

    def _told(self, *result):
        obs, info, self.legal = self.observation_space.sample(), {}, None
        in_obs = isinstance(obs, dict) and "action_mask" in obs
        silent = {
            "sometimes": (self.elapsed + self.length) % 3 == 0,
            "until the end": self.elapsed == self.length,
            "method": self.elapsed == self.length,
            "reset": self.elapsed > 0,
            "step": self.elapsed == 0,
        }.get(self.mask, False)
        if in_obs or (self.mask and not silent):
            self.legal = [self._legal(number) for number in self.numbers]
            flat = np.concatenate(self.legal)
            if in_obs:
                obs["action_mask"] = flat.astype(np.int8)
            elif self.mask != "method":
                info["action_mask"] = tuple(self.legal) if self.mask == "tuple" else flat.astype(np.int8)
        self.observed.append(obs)
        self.masks.append(None if self.legal is None else np.concatenate(self.legal))
        return (obs, *result, info)

    def _legal(self, number):
        """A random mask; every other time only one is legal."""
        legal = self.np_random.integers(2, size=number).astype(bool) & bool(self.np_random.integers(2))
        legal[self.np_random.integers(number)] = True
        return legal


class OneStep(gym.Env):
    """A probe: one observation, one action, one reward, the end."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)
    observations = (0.0,)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = np.array([self.np_random.choice(self.observations)], np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, self.reward(self.obs[0], action), True, False, {}


class ConstantReward(OneStep):
    """V = 1."""

    def reward(self, obs, action):
        return 1.0


class RewardIsObservation(OneStep):
    """V(obs) = obs, which is -1 or 1."""

    observations = (-1.0, 1.0)

    def reward(self, obs, action):
        return float(obs)


class ActionDecides(OneStep):
    """Action 1 pays 1, action 0 costs 1: V = 1 once that is learned."""

    def reward(self, obs, action):
        return 1.0 if action == 1 else -1.0


class RiseAndFall(OneStep):
    """Pays more with each episode up to the 40th, then less again, whatever is done."""

    episodes = 0

    def reward(self, obs, action):
        self.episodes += 1
        return -abs(self.episodes - 40.0)


class ActionMeetsObservation(OneStep):
    """Action 1 is right at obs 1 and action 0 at obs -1."""

    observations = (-1.0, 1.0)

    def reward(self, obs, action):
        return 1.0 if (action == 1) == (obs > 0) else -1.0


class RewardAtTheEnd(gym.Env):
    """Two steps, obs 0 then 1, the second pays 1: V(1) = 1 and V(0) = gamma."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        return np.ones(1, np.float32), float(self.elapsed == 2), self.elapsed == 2, False, {}


class Forever(gym.Env):
    """Nothing changes, each step pays 1, and only a time limit ends it: V = 1 / (1 - gamma)."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


class Cue(gym.Env):
    """The first observation says which action is right until the end, 2 to 9 steps later, and no other does.

    A right step pays its part of 1. Observations: the cue, -1 or 1, or later 0; and whether it is the first one.
    """

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right, self.length = int(self.np_random.integers(2)), int(self.np_random.integers(2, 10))
        self.truncates = bool(self.np_random.integers(2))
        self.elapsed = 0
        return np.array([2 * self.right - 1, 1], np.float32), {}

    def step(self, action):
        self.elapsed += 1
        ended = self.elapsed == self.length
        reward = float(action == self.right) / self.length
        return np.zeros(2, np.float32), reward, ended and not self.truncates, ended and self.truncates, {}


class IdentityDiscrete(gym.Env):
    """Name the number that is lit, 16 times: 1 for each right answer."""

    observation_space = Box(0.0, 1.0, (4,), np.float32)
    action_space = Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return self._obs(), {}

    def step(self, action):
        reward = float(action == self.number)
        self.elapsed += 1
        return self._obs(), reward, self.elapsed == 16, False, {}

    def _obs(self):
        self.number = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.number]


class MaskedIdentity(IdentityDiscrete):
    """The same, as one of -1 to 2 in a Dict, where a mask rules out two wrong answers."""

    observation_space = Dict(lit=Discrete(4, start=-1), action_mask=MultiBinary(4))

    def _obs(self):
        super()._obs()
        mask = np.zeros(4, np.int8)
        mask[[self.number, (self.number + 1 + self.elapsed % 3) % 4]] = 1
        return {"lit": self.number - 1, "action_mask": mask}


class IdentityBox(gym.Env):
    """Say the two numbers that are shown, 16 times: minus the squared error."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return self._obs(), {}

    def step(self, action):
        reward = -float(np.square(action - self.number).sum())
        self.elapsed += 1
        return self._obs(), reward, self.elapsed == 16, False, {}

    def _obs(self):
        self.number = self.np_random.uniform(-0.8, 0.8, 2)
        return self.number.astype(np.float32)


def any_spaces(num_envs, mode="NextStep", **kwargs):
    """AnySpaces in a chosen autoreset mode."""
    return SyncVectorEnv([lambda: AnySpaces(**kwargs)] * num_envs, autoreset_mode=AutoresetMode(mode))


def cues(num_envs, mode="NextStep"):
    """Cue in a chosen autoreset mode."""
    return SyncVectorEnv([Cue] * num_envs, autoreset_mode=AutoresetMode(mode))


class Wandering(gym.Env):
    """Changes the current directory in each call."""

    observation_space, action_space = Box(-1.0, 1.0, (2,), np.float32), Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, to, render_mode=None):
        self.to, self.render_mode = to, render_mode
        self.go()

    def go(self):
        if self.to is not None:
            os.chdir(self.to)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.go()
        self.elapsed = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.go()
        self.elapsed += 1
        return np.zeros(2, np.float32), 1.0, self.elapsed == 5, False, {}

    def render(self):
        self.go()
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        self.go()


def _register(env_id, **spec):
    if env_id not in gym.registry:
        gym.register(env_id, disable_env_checker=True, **spec)


for _id, _class in {
    "Walk-v0": Walk,
    "Walk-v1": Walk,
    "Fragile-v0": Fragile,
    "Failing-v0": Failing,
    "Lengths-v0": Lengths,
    "Recorder-v0": Recorder,
    "Spaces-v0": Spaces,
    "ProbeConstantReward-v0": ConstantReward,
    "ProbeRewardIsObservation-v0": RewardIsObservation,
    "ProbeRewardAtTheEnd-v0": RewardAtTheEnd,
    "ProbeActionDecides-v0": ActionDecides,
    "RiseAndFall-v0": RiseAndFall,
    "ProbeActionMeetsObservation-v0": ActionMeetsObservation,
    "Cue-v0": Cue,
    "IdentityDiscrete-v0": IdentityDiscrete,
    "IdentityBox-v0": IdentityBox,
    "MaskedIdentity-v0": MaskedIdentity,
}.items():
    _register(_id, entry_point=_class)
_register("AnySpacesVector-v0", vector_entry_point=any_spaces)
_register("CueVector-v0", vector_entry_point=cues)
_register("ProbeTimeLimit-v0", entry_point=Forever, max_episode_steps=4)
_register("WalkVector-v0", vector_entry_point=WalkVector)
_register("FaultyVector-v0", vector_entry_point=FaultyVector)
