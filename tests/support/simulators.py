"""Stand-ins with the signatures of simulators of tensors: of Isaac Lab, rsl_rl (of two ages) and ManiSkill 3."""

import sys
import types

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from tensordict import TensorDict


class World:
    """N counters that observe (place, steps). Beyond place 1 an episode terminates and pays 1; at 5 steps its time is up.

    Actions move the place. All that `advance` returns are its own buffers, which the next call writes to.
    """

    def __init__(self, num_envs):
        self.num_envs, self.device, self.max_episode_length = num_envs, "cpu", 5
        self.obs, self.reward = torch.zeros(num_envs, 2), torch.zeros(num_envs)
        self.terminated, self.truncated = torch.zeros(2, num_envs, dtype=torch.bool)
        self.closed = False

    def start(self, rows):
        self.obs[rows] = 0.0
        return self.obs

    def advance(self, action, resets=True):
        assert isinstance(action, torch.Tensor)
        self.obs += torch.cat((action, torch.ones_like(action)), -1)
        self.terminated.copy_(self.obs[:, 0] > 1.0)
        self.truncated.copy_((self.obs[:, 1] >= 5.0) & ~self.terminated)
        self.reward.copy_(self.terminated)
        if resets:
            self.start(self.terminated | self.truncated)


class IsaacLab(gym.Env):
    """As isaaclab.envs.DirectRLEnv: a gymnasium.Env whose observations are groups."""

    metadata = {"render_modes": [None, "human", "rgb_array"]}  # noqa: RUF012

    def __init__(self, num_envs, groups=("policy", "critic")):
        self.world = World(num_envs)
        self.num_envs, self.device = num_envs, self.world.device
        self.groups = groups
        self.single_observation_space = Dict({group: Box(-np.inf, np.inf, (2,)) for group in groups})
        self.single_action_space = Box(-np.inf, np.inf, (1,))
        self.observation_space = batch_space(self.single_observation_space[groups[0]], num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.extras = {}

    def reset(self, seed=None, options=None):
        self.seeded = seed
        self.world.start(slice(None))
        return dict.fromkeys(self.groups, self.world.obs), self.extras

    def step(self, action):
        world = self.world
        world.advance(action)
        return dict.fromkeys(self.groups, world.obs), world.reward, world.terminated, world.truncated, self.extras

    def close(self):
        self.world.closed = True


class RslRl:
    """As rsl_rl.env.VecEnv of today: a TensorDict of groups, no reset."""

    num_actions = 1

    def __init__(self, num_envs, time_outs=True):
        self.world = World(num_envs)
        self.num_envs, self.device, self.max_episode_length = num_envs, torch.device("cpu"), 5
        self.episode_length_buf, self.cfg, self.time_outs = self.world.obs[:, 1], {}, time_outs

    def get_observations(self):
        return TensorDict({"policy": self.world.obs, "privileged": self.world.obs * 0.0}, batch_size=[self.num_envs])

    def step(self, actions):
        self.world.advance(actions)
        dones = (self.world.terminated | self.world.truncated).to(dtype=torch.long)
        extras = {"log": {"/place": 1.0}} | ({"time_outs": self.world.truncated} if self.time_outs else {})
        return self.get_observations(), self.world.reward, dones, extras


class Uphill(RslRl):
    """Pays for each step upwards too."""

    def step(self, actions):
        obs, rewards, dones, extras = super().step(actions)
        return obs, rewards + 0.5 * actions[:, 0].clamp(-1.0, 1.0), dones, extras


class Genesis(RslRl):
    """As Genesis' examples/locomotion/go2_env.py, of rsl_rl 2: observations with extras, time-outs as floats, a reset."""

    def get_observations(self):
        return self.world.obs, {"observations": {"critic": self.world.obs}}

    def step(self, actions):
        self.world.advance(actions)
        extras = {"observations": {"critic": self.world.obs}, "time_outs": self.world.truncated.float()}
        return self.world.obs, self.world.reward, self.world.terminated | self.world.truncated, extras

    def reset(self):
        return self.world.start(slice(None)), None


class BaseEnv(gym.Env):
    """As mani_skill.envs.sapien_env.BaseEnv inside its time limit: no reset within the step."""

    __module__ = "mani_skill.envs.sapien_env"

    def __init__(self, num_envs):
        self.world = World(num_envs)
        self.num_envs, self.device, self.reconfiguration_freq = num_envs, self.world.device, 0
        self.single_observation_space, self.single_action_space = Box(-np.inf, np.inf, (2,)), Box(-1.0, 1.0, (1,))

    def reset(self, seed=None, options=None):
        self.world.start((options or {}).get("env_idx", slice(None)))
        return self.world.obs, {}

    def step(self, action):
        world = self.world
        world.advance(action, resets=False)
        return world.obs.clone(), world.reward.clone(), world.terminated.clone(), world.truncated.clone(), {}


class ManiSkillVectorEnv(VectorEnv):
    """As mani_skill.vector.wrappers.gymnasium.ManiSkillVectorEnv: resets within the step, and does not declare it."""

    def __init__(self, env, num_envs=1, auto_reset=True, ignore_terminations=False, record_metrics=False, **kwargs):
        self._env, self.auto_reset, self.num_envs, self.spec = env, auto_reset, env.num_envs, None
        self.single_observation_space, self.single_action_space = env.single_observation_space, env.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    @property
    def base_env(self):
        return self._env.unwrapped

    @property
    def unwrapped(self):
        return self.base_env

    def reset(self, *, seed=None, options=None):
        return self._env.reset(seed=seed, options=options)

    def step(self, actions):
        obs, reward, terminations, truncations, infos = self._env.step(actions)
        dones = torch.logical_or(terminations, truncations)
        if dones.any() and self.auto_reset:
            final_obs, env_idx = obs.clone(), torch.arange(self.num_envs)[dones]
            obs, infos = self.reset(options={"env_idx": env_idx})
            infos |= {"final_observation": final_obs, "final_info": {}, "_final_observation": dones, "_final_info": dones}
        return obs, reward, terminations, truncations, infos


def install_maniskill(monkeypatch):
    """Make `import mani_skill.vector.wrappers.gymnasium` find the stand-in."""
    for name in ("mani_skill", "mani_skill.vector", "mani_skill.vector.wrappers", "mani_skill.vector.wrappers.gymnasium"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mani_skill.vector.wrappers.gymnasium"].ManiSkillVectorEnv = ManiSkillVectorEnv


def make_isaac(num_envs):
    return IsaacLab(num_envs)


def make_base(num_envs):
    return BaseEnv(num_envs)


def make_wrapped(num_envs):
    """As gym.make returns it: inside gymnasium's wrappers."""
    return gym.wrappers.OrderEnforcing(IsaacLab(num_envs))


def make_maniskill(num_envs, auto_reset=True):
    return ManiSkillVectorEnv(BaseEnv(num_envs), auto_reset=auto_reset)


def make_of_four():
    return IsaacLab(4)


def make_groups(num_envs):
    return IsaacLab(num_envs, ("proprioception", "camera"))
