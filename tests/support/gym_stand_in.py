"""A stand-in for OpenAI's gym with what shimmy reads of it, and environments of its two interfaces."""

import sys
import types

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


class Env:
    """gym.Env."""

    metadata = {"render.modes": []}  # noqa: RUF012
    render_mode = None

    @property
    def unwrapped(self):
        return self

    def close(self):
        pass


Env.__module__ = "gym.core"


class Wrapper(Env):
    """gym.Wrapper, with the name of the checker that fails with numpy 2."""

    def __init__(self, env):
        self.env, self.metadata, self.render_mode = env, env.metadata, env.render_mode

    def __getattr__(self, name):
        return getattr(self.env, name)

    @property
    def unwrapped(self):
        return self.env.unwrapped

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)

    def step(self, action):
        return self.env.step(action)


class PassiveEnvChecker(Wrapper):
    def step(self, action):
        raise AttributeError("module 'numpy' has no attribute 'bool8'")


def install(monkeypatch):
    """Make `import gym` find the stand-in, and shimmy read it anew."""
    gym, wrappers = types.ModuleType("gym"), types.ModuleType("gym.wrappers")
    gym.Env, gym.spaces, gym.wrappers = Env, gymnasium.spaces, wrappers
    gym.envs, gym.make = types.SimpleNamespace(registry=REGISTRY), make
    for name in [name for name in sys.modules if name.partition(".")[0] == "shimmy"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in (("gym", gym), ("gym.wrappers", wrappers), ("gym.spaces", gymnasium.spaces)):
        monkeypatch.setitem(sys.modules, name, module)


class Of21(Env):
    """Five steps an episode, which pay the action; the last one is a time limit's. Starts at a number that its seed draws."""

    metadata = {"render.modes": ["rgb_array"], "video.frames_per_second": 7}  # noqa: RUF012
    observation_space, action_space = Box(-9.0, 9.0, (2,)), Discrete(2)
    rng = np.random.default_rng(0)

    def seed(self, seed=None):
        self.rng = np.random.default_rng(seed)

    def reset(self):
        self.time, self.luck = 0, self.rng.random()
        return np.array([self.luck, 0], np.float32)

    def step(self, action):
        self.time += 1
        obs, over = np.array([self.luck, self.time], np.float32), self.time == 5
        return obs, float(action), over, {"TimeLimit.truncated": True} if over else {}

    def render(self, mode="human"):
        assert mode == "rgb_array"
        return np.full((8, 8, 3), self.time, np.uint8)


class Unseeded21(Of21):
    """Without `seed`, which gym's Env no longer has."""

    seed = property(lambda self: getattr(None, "seed"))  # noqa: B009


class Of26(Of21):
    """As Of21, with the interface of gymnasium."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seed(seed)
        return super().reset(), {}

    def step(self, action):
        obs, reward, over, info = super().step(action)
        return obs, reward, False, over, info

    def render(self):
        return super().render(self.render_mode)


def make_21():
    return Wrapper(Of21())


def make_26(render_mode=None):
    return Wrapper(PassiveEnvChecker(Of26(render_mode)))


class Compatible(Of26):
    """What gym 0.26 makes of an environment that was written before it."""

    def __init__(self, env, render_mode):
        self.env, self.render_mode, self.metadata = env, render_mode, env.metadata

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.env.seed(seed)
        return self.env.reset(), {}

    def step(self, action):
        obs, reward, over, info = self.env.step(action)
        return obs, reward, False, over, info

    def render(self):
        return self.env.render(self.render_mode)


REGISTRY = {"Before-v0": Of21, "After-v0": Of26, "Unseeded-v0": Unseeded21}


def make(env_id, apply_api_compatibility=False, **kwargs):
    """gym.make of 0.26, whose wrappers take the new interface alone."""
    kind = REGISTRY[env_id.rpartition(":")[2]]
    if apply_api_compatibility:
        return Compatible(kind(), kwargs.pop("render_mode", None))
    return PassiveEnvChecker(kind(**kwargs))


class StandsAlone:
    """As Crafter's environment is where gym is not installed."""

    def reset(self): ...

    def step(self, action): ...
