"""A trained policy as a user holds it: observations in, actions out, normalisation and bounds included."""

from collections.abc import Mapping
from typing import Any, Protocol, overload

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo.core.programs import Normalization, normalize_obs
from fastppo.policy.networks import MLPActorCritic
from fastppo.policy.normalization import RunningMoments, make_normalization
from fastppo.policy.spaces import ActionSpec, action_spec, check_obs_space, space_from_data, space_to_data


class NetworkConfig(Protocol):
    """The settings that shape the network; TrainConfig has them."""

    @property
    def hidden_sizes(self) -> tuple[int, ...]: ...
    @property
    def activation(self) -> str: ...
    @property
    def share_backbone(self) -> bool: ...
    @property
    def log_std_init(self) -> float: ...
    @property
    def squash_actions(self) -> bool: ...


def make_network(obs_space: gym.spaces.Box, action: ActionSpec, config: NetworkConfig) -> MLPActorCritic:
    """The network for these spaces."""
    return MLPActorCritic(
        obs_space.shape[0],
        action.size,
        action.distribution,
        config.hidden_sizes,
        config.activation,
        config.share_backbone,
        config.log_std_init,
    )


class Agent:
    """Acts and judges with frozen parameters and statistics. Made by `fastppo.load_policy` or `fastppo.train`."""

    def __init__(
        self,
        obs_space: gym.spaces.Box,
        action: ActionSpec,
        network: MLPActorCritic,
        params: Tensor,
        normalization: Normalization,
    ) -> None:
        """params: flat (P,), copied: training may go on."""
        self.obs_space = obs_space
        self.action = action.to(params.device)
        self.network = network
        self.params = params.detach().clone()
        self.weights = network.weights(self.params)
        self.normalization = normalization
        self.generator = torch.Generator(self.params.device)

    @overload
    def act(self, obs: Tensor, deterministic: bool = True) -> Tensor: ...
    @overload
    def act(self, obs: NDArray[Any], deterministic: bool = True) -> NDArray[Any]: ...
    @torch.inference_mode()
    def act(self, obs: Any, deterministic: bool = True) -> Any:
        """Actions as the environment takes them, for one observation (D,) or a batch (N, D), numpy array or tensor.

        A tensor's are on its own device.
        deterministic: the likeliest action; otherwise one sampled from the policy.
        """
        batch = self._batch(obs)
        dist = self.network.actor(self.weights, normalize_obs(batch, self.normalization))
        if deterministic:
            action = self.action.distribution.mode(dist)
        else:
            noise = self.action.distribution.noise(self.action.noise_shape(len(batch)), self.generator)
            action = self.action.distribution.sample(dist, noise)
        return self._unbatch(self.action.to_env(action), obs)

    @overload
    def value(self, obs: Tensor) -> Tensor: ...
    @overload
    def value(self, obs: NDArray[Any]) -> NDArray[Any]: ...
    @torch.inference_mode()
    def value(self, obs: Any) -> Any:
        """Expected discounted return in units of the environment's own reward: (D,) -> () or (N, D) -> (N,)."""
        value = self.network.critic(self.weights, normalize_obs(self._batch(obs), self.normalization))
        value = value * self.normalization.return_std + self.normalization.return_mean
        if self.normalization.reward_scale is not None:
            value = value / self.normalization.reward_scale
        return self._unbatch(value, obs)

    def seed(self, seed: int) -> None:
        """Seed the sampling of `act(deterministic=False)`."""
        self.generator.manual_seed(seed)

    def _batch(self, obs: Any) -> Tensor:
        batch = torch.as_tensor(obs, device=self.params.device)
        if batch.is_floating_point():
            batch = batch.float()
        if batch.shape[-1:] != self.obs_space.shape or batch.ndim > 2:
            raise ValueError(f"observation of shape {tuple(batch.shape)}; this policy takes {self.obs_space.shape} or a batch")
        return batch.reshape(-1, *self.obs_space.shape)

    def _unbatch(self, batch: Tensor, obs: Any) -> Any:
        if not isinstance(obs, Tensor):
            array = batch.cpu().numpy()
            return array[0] if np.ndim(obs) == 1 else array
        batch = batch.to(obs.device)
        return batch[0] if obs.ndim == 1 else batch


def policy_state(
    network: MLPActorCritic,
    params: Tensor,
    obs_space: gym.Space[Any],
    action_space: gym.Space[Any],
    obs_moments: RunningMoments | None,
    normalization: Normalization,
) -> dict[str, Any]:
    """All of a policy but its network settings, as plain data on the CPU that torch.load(weights_only=True) reads."""
    return {
        "weights": {name: weight.detach().cpu().clone() for name, weight in network.weights(params).items()},
        "obs_space": space_to_data(obs_space),
        "action_space": space_to_data(action_space),
        "obs_moments": None if obs_moments is None else [moment.cpu().clone() for moment in obs_moments],
        "reward_scale": None if normalization.reward_scale is None else normalization.reward_scale.cpu().clone(),
        "return_mean": normalization.return_mean.cpu().clone(),
        "return_std": normalization.return_std.cpu().clone(),
    }


def agent_from_state(state: Mapping[str, Any], config: NetworkConfig, device: torch.device | str = "cpu") -> Agent:
    """The inverse of `policy_state`; raises KeyError, ValueError or RuntimeError when the two do not fit."""
    obs_space = check_obs_space(space_from_data(state["obs_space"]))
    action = action_spec(space_from_data(state["action_space"]), config.squash_actions)
    network = make_network(obs_space, action, config)
    moments = None if state["obs_moments"] is None else RunningMoments(*state["obs_moments"])
    if moments is not None:
        moments = RunningMoments(*(moment.to(device) for moment in moments))
    reward_scale = None if state["reward_scale"] is None else state["reward_scale"].to(device)
    return_mean, return_std = state["return_mean"].to(device), state["return_std"].to(device)
    normalization = make_normalization(moments, reward_scale, return_mean, return_std)
    params = network.flatten(state["weights"]).to(device)
    return Agent(obs_space, action, network, params, normalization)
