"""Environments whose actions are Dicts and Tuples, and whose best action is known. Knows nothing of fastppo,
but for the wrapper of `Kick`.

Their ids work as `composites:Parts` wherever tests/support is on the path (conftest.py puts it there).
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

SPACES = {
    # names that are not sorted, in the order of a list; leaves of every kind, three types of floats, first values other than 0
    "hybrid": Dict(
        [
            ("move", Discrete(3, start=-1)),
            ("aim", Tuple([Box(-1.0, 2.0, (2,), np.float64), MultiDiscrete([[2, 3]], start=[[1, -1]])])),
            ("fire", MultiBinary(2)),
            ("gas", Box(0.0, 0.5, (1, 1), np.float16)),
        ]
    ),
    "choices": Tuple([Discrete(3, start=5), Dict(y=MultiBinary((1, 2)), x=MultiDiscrete([2, 4], dtype=np.int32))]),
    "boxes": Tuple([Box(-1.0, 1.0, (2,), np.float32), Dict(b=Box(-0.5, 0.5, (1, 2), np.float64))]),
    "one choice": Tuple([Discrete(4)]),
    "deep": Tuple([Tuple([Tuple([Dict(a=Tuple([Discrete(2), Box(-1.0, 1.0, (1,), np.float32)]))])])]),
}


def leaves(space, action, path=()):
    """(path, space, action) of each part, in the order of the space, by the structure alone."""
    if isinstance(space, Dict):
        return [leaf for name, part in space.spaces.items() for leaf in leaves(part, action[name], (*path, name))]
    if isinstance(space, Tuple):
        return [leaf for i, part in enumerate(space.spaces) for leaf in leaves(part, action[i], (*path, i))]
    return [(path, space, action)]


def numbers_of(space):
    """How many values each choice of a leaf has; [] for a Box."""
    if isinstance(space, MultiBinary):
        return [2] * int(np.prod(space.shape))
    return [int(n) for n in np.ravel(getattr(space, "nvec", getattr(space, "n", [])))]


class Parts(gym.Env):
    """Each step pays, for each part of the action, how near it is to what the observation, -1 or 1, asks for.

    A choice is right at its first value for -1 and at its last for 1, and pays 1. A number is right at a quarter of its range
    for -1 and at three quarters for 1, and pays 1 less its distance in ranges. Episodes have 1 to 7 steps and end in both ways.

    It raises for an action that is not in its space or of another type, and for an illegal one. mask: "info", "method", or
    "parts" and "method parts", in the structure of the space; None: there is none. What is right is always legal.
    """

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, kind="hybrid", mask=None, render_mode=None):
        self.action_space, self.mask, self.render_mode = copy.deepcopy(SPACES[kind]), mask, render_mode
        if mask in ("method", "method parts"):
            self.action_masks = self.told_mask
        self.received, self.legal = [], None
        places = leaves(self.action_space, self.action_space.sample())
        self.numbers = {path: numbers_of(space) for path, space, _ in places if numbers_of(space)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.truncates = int(self.np_random.integers(1, 8)), bool(self.np_random.integers(2))
        self.elapsed = 0
        return self._next()

    def step(self, action):
        assert self.action_space.contains(action), action
        places = leaves(self.action_space, action)
        reward = 0.0
        for path, space, part in places:
            assert np.shape(part) == space.shape, (path, part)
            assert part.dtype == space.dtype, (path, part.dtype)
            reward += self.paid(path, space, part)
        self.received.append(copy.deepcopy(action))
        self.elapsed += 1
        ended = self.elapsed == self.length
        obs, info = self._next()
        return obs, reward, ended and not self.truncates, ended and self.truncates, info

    def paid(self, path, space, part):
        """For one leaf; raises if it is illegal."""
        if isinstance(space, Box):
            share = 0.25 if self.goal < 0 else 0.75
            best = space.low.astype(np.float64) * (1 - share) + space.high.astype(np.float64) * share
            return float((1 - np.abs(part - best) / (space.high - space.low).astype(np.float64)).sum())
        chosen, numbers = np.ravel(part - getattr(space, "start", 0)), numbers_of(space)
        if self.legal is not None:
            for value, legal in zip(chosen, self.legal[path], strict=True):
                assert legal[value], f"{part} at {path} is illegal: {legal}"
        return float(sum(value == (0 if self.goal < 0 else n - 1) for value, n in zip(chosen, numbers, strict=True)))

    def told_mask(self):
        """The present mask as `mask` says."""
        if self.mask in ("info", "method"):
            return np.concatenate([legal for part in self.legal.values() for legal in part])
        return self._structure(self.action_space, ())

    def _structure(self, space, path):
        """gymnasium's form of masks for `space.sample(mask)`, but two numbers for each bit."""
        if isinstance(space, Dict):
            return {name: self._structure(part, (*path, name)) for name, part in space.spaces.items()}
        if isinstance(space, Tuple):
            return tuple(self._structure(part, (*path, i)) for i, part in enumerate(space.spaces))
        if isinstance(space, Box):
            return None
        legal = self.legal[path]
        return legal[0] if isinstance(space, Discrete) else tuple(legal)

    def _next(self):
        self.goal = float(self.np_random.choice([-1.0, 1.0]))
        info = {}
        if self.mask:
            self.legal = {path: list(map(self._legal, numbers)) for path, numbers in self.numbers.items()}
            if "method" not in self.mask:
                info["action_mask"] = self.told_mask()
        return np.array([self.goal], np.float32), info

    def _legal(self, number):
        legal = self.np_random.integers(2, size=number).astype(np.int8)
        legal[0 if self.goal < 0 else -1] = 1
        return legal

    def render(self):
        return np.full((32, 32, 3), 100, np.uint8)


class PartsVector(SyncVectorEnv):
    """A vector class of its own, in a chosen autoreset mode."""

    def __init__(self, num_envs, mode="NextStep", **kwargs):
        super().__init__([lambda: Parts(**kwargs)] * num_envs, autoreset_mode=AutoresetMode(mode))


class TensorParts(PartsVector):
    """The same with tensors: dicts and tuples of tensors in, tensors out."""

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return torch.from_numpy(obs.copy()), info

    def step(self, actions):
        assert all(isinstance(part, torch.Tensor) for _, _, part in leaves(self.single_action_space, actions))
        obs, *rest, info = super().step(_arrays(actions))
        return torch.from_numpy(obs.copy()), *map(torch.from_numpy, rest), info


def _arrays(action):
    if isinstance(action, dict):
        return {name: _arrays(part) for name, part in action.items()}
    return tuple(map(_arrays, action)) if isinstance(action, tuple) else action.numpy()


gym.register("PartsVector-v0", vector_entry_point=PartsVector)
gym.register("TensorParts-v0", vector_entry_point=TensorParts)


@dataclass(frozen=True)
class Kick:
    """On the device: each step pays for the way and the bits that the observation, -1 or 1, asks for, less the error of two

    numbers that should be half of it.
    """

    max_episode_steps: int | None = 8
    num_random: ClassVar[int] = 1
    observation_space: ClassVar[gym.Space] = Box(-1.0, 1.0, (1,), np.float32)
    action_space: ClassVar[gym.Space] = Dict(
        [("way", Discrete(3, start=-1)), ("force", Tuple([Box(-1.0, 1.0, (2,), np.float32), MultiBinary(2)]))]
    )

    def reset(self, random):
        goal = torch.where(random[:, 0] < 0.5, -1.0, 1.0)
        return goal, goal[:, None]

    def step(self, state, action, random):
        force, bits = action["force"]
        right = (action["way"] == state.long()).float() + (bits == (state > 0)[:, None]).float().sum(-1)
        goal, obs = self.reset(random)
        none = torch.zeros_like(goal, dtype=torch.bool)
        return goal, obs, right - (force - 0.5 * state[:, None]).abs().sum(-1), none, none


def _kick(num_envs, **kwargs):
    from fastppo.envs.device import TorchVectorEnv  # here: the other environments need no fastppo

    return TorchVectorEnv(Kick(**kwargs), num_envs)


gym.register("Kick-v0", vector_entry_point=_kick)
