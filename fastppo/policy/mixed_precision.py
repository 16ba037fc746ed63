"""`--bf16`: a policy whose networks compute in bfloat16, by torch.autocast (Micikevicius et al., 2018, arXiv 1710.03740).

Parameters and gradients stay float32, and so does what the networks return: distributions, log-probabilities, values, losses.
bfloat16 has the range of float32, so losses need no scaling.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.contracts import Obs, Weights
from fastppo.policy.distributions import Family
from fastppo.policy.network import DistributionMixin, Network


@dataclass(frozen=True)
class AutocastPolicy(DistributionMixin):
    """A `core.contracts.Policy` without memory, its forward passes under autocast."""

    policy: Network
    distribution: Family = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "distribution", self.policy.distribution)

    def weights(self, params: Tensor) -> Weights:
        """Views of the flat buffer, float32."""
        return self.policy.weights(params)

    def actor(self, weights: Weights, obs: Obs) -> Any:
        """Parameters of the action distribution, float32."""
        with _autocast(weights):
            dist = self.policy.actor(weights, obs)
        return _float32(dist)

    def critic(self, weights: Weights, obs: Obs) -> Tensor:
        """V(obs), float32."""
        with _autocast(weights):
            value = self.policy.critic(weights, obs)
        return value.float()

    def actor_critic(self, weights: Weights, obs: Obs) -> tuple[Any, Tensor]:
        """Both, float32."""
        with _autocast(weights):
            dist, value = self.policy.actor_critic(weights, obs)
        return _float32(dist), value.float()

    def sources(self) -> list[Path] | None:
        """Those of the policy; this file is in their folder."""
        return self.policy.sources()


def _autocast(weights: Weights) -> torch.autocast:
    """bfloat16 on the device of the weights. Nothing is cached: a captured program must not find a cast of an earlier one."""
    device = next(iter(weights.values())).device.type
    return torch.autocast(device, torch.bfloat16, cache_enabled=False)


def _float32(dist: Any) -> Any:
    """The floating point tensors of a distribution's parameters as float32."""
    return tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, dist)
