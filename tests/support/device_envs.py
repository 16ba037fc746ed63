"""Environments on the device: all that `collect` takes."""

import dataclasses
import functools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box

from fastppo.core.acting import collect
from fastppo.core.contracts import Normalization
from fastppo.envs.classic import CartPole, Pendulum
from fastppo.envs.device import TorchVectorEnv
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.env_step import env_step_of, pack
from fastppo.rollout.storage import allocate_rollout

T, N = 11, 6
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Environments, their policy and all that `collect` wants."""

    envs: TorchVectorEnv
    spec: object
    policy: MLPActorCritic
    params: torch.Tensor
    normalization: Normalization

    @property
    def obs(self):
        return obs_spec(self.envs.single_observation_space)

    def rollout(self):
        return allocate_rollout(T, N, self.obs, self.spec, False, CPU)

    def noise(self, seed):
        return self.spec.distribution.noise(self.spec.noise_shape(T, N), torch.Generator().manual_seed(seed))

    def program(self, **settings):
        return functools.partial(collect, policy=self.policy, env_step=env_step_of(self.envs, self.spec), **settings)

    def arguments(self, seed=0):
        """A rollout's; the environments stand where they stand."""
        return self.params, self.normalization, pack(self.envs.running), self.noise(seed), self.envs.draw(T)


def setup(env, squash=False, norm_obs=False, seed=1):
    """A policy that pushes hard enough for the bounds of actions to matter."""
    envs = TorchVectorEnv(env, N)
    envs.reset(seed=2 + seed)
    spec = action_spec(env.action_space, squash)
    size = env.observation_space.shape[0]
    policy = MLPActorCritic(size, spec.size, spec.distribution, (8, 8), log_std_init=0.5)
    params = policy.init(torch.Generator().manual_seed(seed))
    params += 0.1 * torch.randn(params.shape, generator=torch.Generator().manual_seed(2))
    mean, scale = (
        ({"obs": torch.linspace(-0.1, 0.2, size)}, {"obs": torch.linspace(2.0, 5.0, size)}) if norm_obs else (None, None)
    )
    return Setup(envs, spec, policy, params, Normalization(mean, scale, None, torch.zeros(()), torch.ones(())))


ON_TENSORS = "OnTensors-v0"
gym.register(ON_TENSORS, vector_entry_point=lambda num_envs: TorchVectorEnv(CartPole(), num_envs))


@dataclasses.dataclass(frozen=True)
class Spoilt(Pendulum):
    """A pendulum with a constant tensor in its step, whose reward is not finite beyond 1000 rad, where only tests put it."""

    WIND: ClassVar[torch.Tensor] = torch.tensor([0.25, 0.5])
    worst: float = float("-inf")

    def step(self, state, action, random):
        state, obs, reward, terminated, truncated = super().step(state, action + self.WIND[1] * random[:, :1], random)
        return state, obs, torch.where(state.theta > 1000.0, self.worst, reward - self.WIND[0]), terminated, truncated


gym.register("Pushed-v0", vector_entry_point=lambda num_envs, **kwargs: TorchVectorEnv(Spoilt(**kwargs), num_envs))


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Counts its steps and never ends; in the 41st, `what` of environment 2 is not finite."""

    what: str = "reward"
    max_episode_steps: ClassVar[None] = None
    num_random: ClassVar[int] = 1
    observation_space: ClassVar[gym.Space] = Box(-np.inf, np.inf, (1,), np.float32)
    action_space: ClassVar[gym.Space] = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, random):
        return torch.zeros_like(random[:, 0]), torch.zeros_like(random)

    def step(self, state, action, random):
        state = state + 1.0
        bad = (state == 41.0) & (torch.arange(len(state), device=state.device) == 2)
        reward = state.masked_fill(bad, float("nan")) if self.what == "reward" else state
        obs = state.masked_fill(bad, float("inf")) if self.what == "obs" else state
        going_on = torch.zeros_like(bad)
        return state, obs.unsqueeze(-1), reward, going_on, going_on


gym.register("Faulty-v0", vector_entry_point=lambda num_envs, **kwargs: TorchVectorEnv(Faulty(**kwargs), num_envs))
