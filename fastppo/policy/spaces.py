"""Between an environment's spaces and the numbers a policy sees and samples. Knows nothing of networks or learning.

The rollout stores actions as sampled; bounds are applied on the way to the environment only, so the log-probabilities
that PPO compares are those of what was sampled.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from fastppo.errors import UsageError
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL, Distribution


@dataclass(frozen=True)
class ActionSpec:
    """One action of one environment: how it is distributed, stored and handed over."""

    space: gym.Space[Any]
    distribution: Distribution
    size: int  # A: logits, or components
    shape: tuple[int, ...]  # as stored: () or (A,)
    dtype: torch.dtype  # as stored
    env_dtype: torch.dtype
    low: Tensor  # (A,), for Box
    high: Tensor
    squash: bool

    def to_env(self, action: Tensor) -> Tensor:
        """Stored actions (N, *shape) -> what the environments take: shifted, clipped or squashed to the space.

        Box actions are to be on the device that the bounds are on: the CPU, or where `to` has put them.
        """
        if isinstance(self.space, gym.spaces.Discrete):
            return action + int(self.space.start) if self.space.start else action
        if self.squash:
            action = self.low + (action.tanh() + 1.0) * (0.5 * (self.high - self.low))
        else:
            action = torch.minimum(torch.maximum(action, self.low), self.high)
        return action.to(self.env_dtype).reshape(*action.shape[:-1], *(self.space.shape or ()))

    def to(self, device: torch.device) -> "ActionSpec":
        """The same with its bounds on `device`."""
        return replace(self, low=self.low.to(device), high=self.high.to(device))

    def noise_shape(self, *batch: int) -> tuple[int, ...]:
        """Shape of the noise that samples a batch of actions."""
        return (*batch, self.size)


def action_spec(space: gym.Space[Any], squash: bool) -> ActionSpec:
    """The policy's side of an action space; raises UsageError for one that is not supported."""
    none = torch.empty(0)
    if isinstance(space, gym.spaces.Discrete):
        if squash:
            raise UsageError("--squash-actions is for Box action spaces; this environment's is Discrete")
        return ActionSpec(space, CATEGORICAL, int(space.n), (), torch.int64, torch.int64, none, none, False)
    if isinstance(space, gym.spaces.Box) and np.issubdtype(space.dtype, np.floating):
        size = math.prod(space.shape)
        low = torch.from_numpy(space.low).float().flatten()
        high = torch.from_numpy(space.high).float().flatten()
        if squash and not (low.isfinite().all() and high.isfinite().all()):
            raise UsageError("--squash-actions needs finite action bounds; this environment has none: leave it off")
        env_dtype = torch.float64 if space.dtype == np.float64 else torch.float32
        return ActionSpec(space, DIAGONAL_NORMAL, size, (size,), torch.float32, env_dtype, low, high, squash)
    raise UsageError(f"--env-id: action space {space} is not supported; supported: Discrete, Box of floats")


def check_obs_space(space: gym.Space[Any]) -> gym.spaces.Box:
    """The observation space, if it is one that the networks take; raises UsageError otherwise."""
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return space
    raise UsageError(f"--env-id: observation space {space} is not supported; supported: Box of shape (D,)")


def space_to_data(space: gym.Space[Any]) -> dict[str, Any]:
    """A supported space as plain data for a checkpoint."""
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, gym.spaces.Box)
    low, high = torch.from_numpy(space.low.copy()), torch.from_numpy(space.high.copy())
    return {"type": "Box", "low": low, "high": high, "dtype": str(space.dtype)}


def space_from_data(data: dict[str, Any]) -> gym.Space[Any]:
    """The inverse of `space_to_data`; raises KeyError or ValueError for data that describes no supported space."""
    if data["type"] == "Discrete":
        return gym.spaces.Discrete(data["n"], start=data["start"])
    if data["type"] == "Box":
        return gym.spaces.Box(data["low"].numpy(), data["high"].numpy(), dtype=np.dtype(data["dtype"]).type)
    raise ValueError(f"unknown space {data['type']!r}")
