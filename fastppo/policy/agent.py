"""A trained policy as a user holds it: observations in, actions out, normalisation and bounds included."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import torch
from torch import Tensor

from fastppo.core.programs import Normalization, Obs, normalize_obs
from fastppo.errors import UsageError
from fastppo.policy.networks import ActorCritic, MLPActorCritic, ModuleFactory, ModulePolicy, Network, features_size
from fastppo.policy.normalization import RunningMoments, make_normalization
from fastppo.policy.spaces import ACTION_MASK, ActionSpec, ObsSpec, action_spec, obs_spec, space_from_data, space_to_data


class NetworkConfig(Protocol):
    """The settings that shape the network; TrainConfig has them."""

    @property
    def hidden_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def cnn_size(self) -> int: ...
    @property
    def cnn_activation(self) -> str: ...
    @property
    def share_backbone(self) -> bool: ...
    @property
    def log_std_init(self) -> float: ...
    @property
    def squash_actions(self) -> bool: ...


def make_network(
    obs: ObsSpec, action: ActionSpec, config: NetworkConfig, policy: ModuleFactory | None = None, seed: int = 0
) -> Network:
    """The network for these spaces; policy: somebody's own instead, seed: of its first weights (see `ModulePolicy`)."""
    if policy is not None:
        return ModulePolicy(policy, obs, action, config.log_std_init, seed)
    sizes = config.hidden_sizes
    if sizes is None:
        sizes = () if any(leaf.kind == "image" for leaf in obs) else (64, 64)
    mlp = MLPActorCritic(
        features_size(obs.leaves, config.cnn_size),
        action.size,
        action.distribution,
        sizes,
        config.activation,
        config.share_backbone,
        config.log_std_init,
    )
    if obs.is_plain:
        return mlp
    return ActorCritic(obs.leaves, mlp, config.cnn_size, config.cnn_activation)


class Agent:
    """Acts and judges with frozen parameters and statistics. Made by `fastppo.load_policy` or `fastppo.train`."""

    def __init__(
        self,
        obs_space: gym.Space[Any],
        obs: ObsSpec,
        action: ActionSpec,
        network: Network,
        params: Tensor,
        normalization: Normalization,
    ) -> None:
        """params: flat (P,), copied: training may go on."""
        self.obs_space = obs_space
        self.obs = obs
        self.action = action.to(params.device)
        self.network = network
        self.params = params.detach().clone()
        self.weights = network.weights(self.params)
        self.normalization = normalization
        self.generator = torch.Generator(self.params.device)

    @torch.inference_mode()
    def act(self, obs: Any, deterministic: bool = True, action_mask: Any = None) -> Any:
        """Actions as the environment takes them, for one observation or a batch of them.

        Args:
            obs: as the environment gives it, with or without a leading batch axis: array, tensor, or dict or tuple of these.
            deterministic: the likeliest action; otherwise one sampled from the policy.
            action_mask: which actions are legal, where the environment tells it in its info; None: all.

        Returns:
            Arrays for arrays; for tensors, tensors on their device.

        Raises:
            ValueError: an observation of another shape.
        """
        batch, kind = self._batch(obs, action_mask)
        dist = self.network.actor(self.weights, normalize_obs(batch, self.normalization))
        if deterministic:
            action = self.action.distribution.mode(dist)
        else:
            rows = len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))
            action = self.network.sample(dist, self.action.distribution.noise(self.action.noise_shape(rows), self.generator))
        return kind.unbatch(self.action.to_env(action))

    @torch.inference_mode()
    def value(self, obs: Any) -> Any:
        """Expected discounted return in units of the environment's own reward, of its sign with --clip-reward.

        () for one observation, (N,) for a batch.
        """
        batch, kind = self._batch(obs, None)
        value = self.network.critic(self.weights, normalize_obs(batch, self.normalization))
        value = value * self.normalization.return_std + self.normalization.return_mean
        if self.normalization.reward_scale is not None:
            value = value / self.normalization.reward_scale
        return kind.unbatch(value)

    def seed(self, seed: int) -> None:
        """Seed the sampling of `act(deterministic=False)`."""
        self.generator.manual_seed(seed)

    def _batch(self, obs: Any, action_mask: Any) -> tuple[Obs, "_Kind"]:
        """Observations with a leading axis, as the networks take them, and how they were given."""
        leaves: dict[str, Tensor] = {}
        kind: _Kind | None = None
        for leaf in self.obs:
            given = action_mask if leaf is self.obs.info_mask else leaf.find(obs)
            if given is None:
                continue
            x = torch.as_tensor(given, device=self.params.device).to(leaf.dtype)
            if leaf.kind == "mask":
                x = x.reshape(-1, *leaf.shape)
            elif x.ndim not in (len(leaf.shape), len(leaf.shape) + 1) or x.shape[x.ndim - len(leaf.shape) :] != leaf.shape:
                name = "observation" if leaf.key == "obs" else leaf.key
                raise ValueError(f"{name} of shape {tuple(x.shape)}; this policy takes {leaf.shape} or a batch")
            elif kind is None:
                kind = _Kind(x.ndim == len(leaf.shape), given.device if isinstance(given, Tensor) else None)
            leaves[leaf.key] = x.reshape(-1, *leaf.shape)
        assert kind is not None
        mask = self.obs.info_mask
        if mask is not None and mask.key not in leaves:
            rows = len(next(iter(leaves.values())))
            leaves[ACTION_MASK] = torch.ones((rows, *mask.shape), dtype=torch.bool, device=self.params.device)
        return self.obs.join(leaves), kind


class _Kind(NamedTuple):
    """How an observation was given, and so how an answer is returned."""

    single: bool
    device: torch.device | None  # of a tensor; None: an array

    def unbatch(self, batch: Tensor) -> Any:
        answer = batch.cpu().numpy() if self.device is None else batch.to(self.device)
        return answer[0] if self.single else answer


def policy_state(
    network: Network,
    params: Tensor,
    obs_space: gym.Space[Any],
    obs: ObsSpec,
    action_space: gym.Space[Any],
    obs_moments: Mapping[str, RunningMoments] | None,
    normalization: Normalization,
) -> dict[str, Any]:
    """All of a policy but its network settings, as plain data on the CPU that torch.load(weights_only=True) reads."""
    moments = None if obs_moments is None else {key: [x.cpu().clone() for x in kept] for key, kept in obs_moments.items()}
    return {
        "module": type(network.module).__qualname__ if isinstance(network, ModulePolicy) else None,
        "weights": {name: weight.detach().cpu().clone() for name, weight in network.weights(params).items()},
        "obs_space": space_to_data(obs_space),
        "info_mask_size": None if obs.info_mask is None else obs.info_mask.size,
        "action_space": space_to_data(action_space),
        "obs_moments": moments,
        "reward_scale": None if normalization.reward_scale is None else normalization.reward_scale.cpu().clone(),
        "return_mean": normalization.return_mean.cpu().clone(),
        "return_std": normalization.return_std.cpu().clone(),
    }


def moments_from_state(state: Mapping[str, Any] | None, device: torch.device | str) -> dict[str, RunningMoments] | None:
    """`policy_state`'s obs_moments, back on a device."""
    if state is None:
        return None
    return {key: RunningMoments(*(moment.to(device) for moment in kept)) for key, kept in state.items()}


def agent_from_state(
    state: Mapping[str, Any], config: NetworkConfig, device: torch.device | str = "cpu", policy: ModuleFactory | None = None
) -> Agent:
    """The inverse of `policy_state`; raises KeyError, ValueError or RuntimeError when the two do not fit."""
    if state["module"] is not None and policy is None:
        raise UsageError(f"this policy is a {state['module']} of your own: pass what made it, load_policy(run_dir, policy=...)")
    obs_space = space_from_data(state["obs_space"])
    action = action_spec(space_from_data(state["action_space"]), config.squash_actions)
    obs = obs_spec(obs_space, state["info_mask_size"], action)
    network = make_network(obs, action, config, policy)
    reward_scale = None if state["reward_scale"] is None else state["reward_scale"].to(device)
    return_mean, return_std = state["return_mean"].to(device), state["return_std"].to(device)
    moments = moments_from_state(state["obs_moments"], device)
    normalization = make_normalization(moments, reward_scale, return_mean, return_std)
    params = network.flatten(state["weights"]).to(device)
    return Agent(obs_space, obs, action, network, params, normalization)
