"""The network for observations that are more than one vector: an encoder, then the layers of actor and critic."""

from dataclasses import dataclass, field
from typing import Any

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

    `mlp.obs_size` is `encoder.size`.
    """

    encoder: Encoder
    mlp: MLPActorCritic
    distribution: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", self.mlp.distribution)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of the buffer."""
        return self.encoder, self.mlp

    def actor(self, weights: Weights, obs: Obs) -> Any:
        """Distribution parameters for obs (..., *shape), or its leaves by key."""
        return masked_by(self.mlp.actor(weights, self.encoder.encode(weights, obs)), obs, self.distribution)

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), (...)."""
        return self.mlp.critic(weights, self.encoder.encode(weights, obs))

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Distribution parameters and V(obs)."""
        dist, value = self.mlp.actor_critic(weights, self.encoder.encode(weights, obs))
        return masked_by(dist, obs, self.distribution), value


def masked_by(dist: Any, obs: Obs, family: Family) -> Any:
    """`dist` with the logits of illegal actions masked, if the observation has an action mask."""
    if isinstance(obs, Tensor) or ACTION_MASK not in obs:
        return dist
    return masked(dist, obs[ACTION_MASK], family)
