"""Environments on the device: all that `collect` takes."""

import dataclasses
import functools

import gymnasium as gym
import torch

from fastppo.core.acting import collect
from fastppo.core.contracts import Normalization
from fastppo.envs.classic import CartPole
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
