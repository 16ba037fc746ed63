"""The network for observations that are more than one vector: an encoder, then the layers of actor and critic."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastppo.core.contracts import Obs, Weights
from fastppo.policy.distributions import Family, masked
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.network import Composed, Part
from fastppo.policy.spaces import ACTION_MASK


@dataclass(frozen=True)
class ActorCritic(Composed):
    """An `Encoder` that actor and critic share, then an `MLPActorCritic`. Illegal actions are masked.

    `mlp.obs_size` is `encoder.size`. critic_only: keys of leaves in which the actor gets zeros: an asymmetric actor-critic
    (Pinto et al., 2017, arXiv 1710.06542).
    """

    encoder: Encoder
    mlp: MLPActorCritic
    critic_only: tuple[str, ...] = ()
    distribution: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", self.mlp.distribution)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of the buffer."""
        return self.encoder, self.mlp

    def actor(self, weights: Weights, obs: Obs) -> Any:
        """Distribution parameters for obs (..., *shape), or its leaves by key."""
        dist = self.mlp.actor(weights, self.encoder.encode(weights, self._seen_by_actor(obs)))
        return masked_by(dist, obs, self.distribution)

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), (...)."""
        return self.mlp.critic(weights, self.encoder.encode(weights, obs))

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Distribution parameters and V(obs)."""
        x = self.encoder.encode(weights, obs)  # (..., D)
        if self.critic_only:
            both = torch.stack((self.encoder.encode(weights, self._seen_by_actor(obs)), x)).view(2, -1, x.shape[-1])
            dist, value = self.mlp.both(weights, both, x.shape[:-1])
        else:
            dist, value = self.mlp.actor_critic(weights, x)
        return masked_by(dist, obs, self.distribution), value

    def _seen_by_actor(self, obs: Obs) -> Obs:
        if isinstance(obs, Tensor) or not self.critic_only:
            return obs
        return {key: torch.zeros_like(x) if key in self.critic_only else x for key, x in obs.items()}


def masked_by(dist: Any, obs: Obs, family: Family) -> Any:
    """`dist` with the logits of illegal actions masked, if the observation has an action mask."""
    if isinstance(obs, Tensor) or ACTION_MASK not in obs:
        return dist
    return masked(dist, obs[ACTION_MASK], family)
