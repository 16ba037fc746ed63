"""`--bf16`: a policy whose networks compute in bfloat16, by torch.autocast (Micikevicius et al., 2018, arXiv 1710.03740).

Parameters and gradients stay float32, and so does what the networks return: distributions, log-probabilities, values, losses.
bfloat16 has the range of float32, so losses need no scaling.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.contracts import Obs, Policy, Weights


@dataclass(frozen=True)
class AutocastPolicy:
    """A `core.contracts.Policy` without memory, its forward passes under autocast."""

    policy: Policy

    @property
    def rnn_state_size(self) -> int:
        """0: the policy is not recurrent."""
        return 0

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

    def sample(self, dist: Any, noise: Tensor) -> Tensor:
        """An action from the distribution and its noise."""
        return self.policy.sample(dist, noise)

    def log_prob(self, dist: Any, action: Tensor) -> Tensor:
        """Log-density of the action, (...)."""
        return self.policy.log_prob(dist, action)

    def entropy(self, dist: Any) -> Tensor:
        """Entropy in nats, (...)."""
        return self.policy.entropy(dist)

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
