"""A batched TorchRL environment as a gymnasium vector environment of tensors; no tensor becomes an array.

Steps call `step_and_maybe_reset` of the environment, so it is reset as TorchRL resets it: in the step that ends the
episode, where it is done. That is gymnasium's SAME_STEP with a dense `final_obs`. Importing this module imports torchrl, so
nothing else of ours does. Knows nothing of policies or rollouts.

    gymnasium.register("Mine-v0", vector_entry_point=lambda num_envs: TorchRLVectorEnv(MyEnv(batch_size=[num_envs])))
"""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase

from fastppo.errors import UsageError


class TorchRLVectorEnv(VectorEnv):
    """`EnvBase` of batch size [N] -> VectorEnv of N environments.

    A batch size of several dimensions is flattened; [] is one environment, or `num_envs` of them where the environment takes
    any batch (`batch_locked` is False). Tensors live where the environment keeps them.
    """

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, env: EnvBase, obs_key: NestedKey | None = None, num_envs: int | None = None) -> None:
        """
        Args:
            env: one observation leaf of float, bounded integer, one-hot or binary type, one action leaf (Bounded or Unbounded
                floats, Categorical, OneHot), one reward; keys at the root.
            obs_key: which observation, where there are several.
            num_envs: how many, for an environment that takes any batch.

        Raises:
            UsageError: the environment has what this does not support; the message names it.
        """
        self._env = env
        if env.batch_size == () and not env.batch_locked:
            self._batch = torch.Size([num_envs or 1])
        else:
            self._batch = env.batch_size
        self.num_envs = math.prod(self._batch)
        if num_envs not in (None, self.num_envs):
            raise UsageError(f"num_envs={num_envs}, but the TorchRL environment's batch size is {list(env.batch_size)}")
        self._obs_key = _obs_key(env, obs_key)
        self._action_key = _only("action", env.action_keys)
        self._reward_key = _only("reward", env.reward_keys)
        nested = [key for key in env.done_keys if not isinstance(key, str)]
        if nested:
            raise UsageError(f"TorchRL environment with nested done keys {nested} (multi-agent?) is not supported")
        reward_shape = env.full_reward_spec[self._reward_key].shape[env.batch_dims :]
        if math.prod(reward_shape) != 1:
            raise UsageError(f"TorchRL reward of shape {tuple(reward_shape)} is not supported; supported: one number")

        self._action_spec = env.full_action_spec[self._action_key]
        self._action_shape = self._action_spec.shape[env.batch_dims :]
        self.single_action_space = _action_space(self._action_spec, env.batch_dims)
        self.single_observation_space = _obs_space(env.full_observation_spec[self._obs_key], env.batch_dims)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self._state: TensorDictBase | None = None  # what the next step starts from

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start all episodes: observations (N, ...). `seed` goes to the environment's `set_seed`; `options` are ignored."""
        if seed is not None:
            self._env.set_seed(seed)
        batch = None if self._batch == self._env.batch_size else TensorDict(batch_size=self._batch, device=self._env.device)
        self._state = self._env.reset(batch)
        return self._obs(self._state), {}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step all, reset those that are done.

        Args:
            actions: (N, *single_action_space.shape), a tensor (or what becomes one).

        Returns:
            Observations (N, ...), rewards (N,), terminated and truncated (N,) bool, and an info with `final_obs`, shaped as the
            observations and valid in every row, and `_final_obs` (N,) bool: where an episode ended.
        """
        assert self._state is not None, "reset() comes before step()"
        action = torch.as_tensor(actions, device=self._env.device)
        if isinstance(self._action_spec, OneHot):
            action = torch.nn.functional.one_hot(action.long(), int(self.single_action_space.n))  # type: ignore[attr-defined]
        action = action.to(self._action_spec.dtype).reshape((*self._batch, *self._action_shape))
        stepped, self._state = self._env.step_and_maybe_reset(self._state.set(self._action_key, action))
        outcome = stepped["next"]
        done = torch.stack([outcome[key].reshape(self.num_envs) for key in self._env.done_keys]).any(0)
        terminated = outcome["terminated"].reshape(self.num_envs)
        info = {"final_obs": self._obs(outcome), "_final_obs": done}
        reward = outcome[self._reward_key].reshape(self.num_envs)
        return self._obs(self._state), reward, terminated, done & ~terminated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environment."""
        if not self._env.is_closed:
            self._env.close()

    def _obs(self, state: TensorDictBase) -> Tensor:
        return state[self._obs_key].reshape((self.num_envs, *self.single_observation_space.shape))  # type: ignore[misc]


def _obs_key(env: EnvBase, wanted: NestedKey | None) -> NestedKey:
    """The key of the observation; raises UsageError where it does not exist or has to be named."""
    leaves = list(env.full_observation_spec.keys(include_nested=True, leaves_only=True))
    names = ", ".join(map(str, leaves)) or "none"
    if wanted is not None:
        if wanted not in leaves:
            raise UsageError(f"obs_key={wanted!r}: the TorchRL environment has no such observation; it has: {names}")
        return wanted
    if len(leaves) != 1:
        raise UsageError(
            f"the TorchRL environment has {len(leaves)} observations: {names}; name one with obs_key, or join them with "
            "torchrl's CatTensors transform"
        )
    return leaves[0]


def _only(what: str, keys: list[NestedKey]) -> NestedKey:
    """The one key; raises UsageError where there are several, or where it is nested."""
    if len(keys) != 1:
        raise UsageError(f"the TorchRL environment has {len(keys)} {what} keys: {', '.join(map(str, keys))}; supported: one")
    if not isinstance(keys[0], str):
        raise UsageError(f"TorchRL {what} key {keys[0]} is nested (multi-agent?), which is not supported")
    return keys[0]


def _obs_space(spec: TensorSpec, batch_dims: int) -> gym.spaces.Box:
    """What one environment observes, as a Box; raises UsageError."""
    shape = tuple(spec.shape[batch_dims:])
    if isinstance(spec, (OneHot, Binary)):
        return gym.spaces.Box(0, 1, shape, np.int8)
    if isinstance(spec, (Bounded, Unbounded)) and spec.dtype is not torch.bool:
        return _box(spec, batch_dims)
    raise UsageError(f"TorchRL observation spec {_name(spec)} is not supported; supported: Bounded, Unbounded, OneHot, Binary")


def _action_space(spec: TensorSpec, batch_dims: int) -> gym.Space[Any]:
    """What one environment takes, as a Box of floats or a Discrete; raises UsageError."""
    shape = tuple(spec.shape[batch_dims:])
    if isinstance(spec, (Bounded, Unbounded)) and spec.dtype.is_floating_point:
        return _box(spec, batch_dims)
    discrete = isinstance(spec, (Categorical, OneHot)) and not isinstance(spec, (Binary, MultiCategorical, MultiOneHot))
    if discrete and spec.mask is None and spec.space.n > 0:
        width = spec.space.n if isinstance(spec, OneHot) else 1
        if math.prod(shape) == width:
            return gym.spaces.Discrete(int(spec.space.n))
    raise UsageError(
        f"TorchRL action spec {_name(spec)} is not supported; supported: Bounded or Unbounded floats, Categorical, OneHot "
        "(one action, no mask)"
    )


def _box(spec: TensorSpec, batch_dims: int) -> gym.spaces.Box:
    """Bounds of the first environment, which have to be those of all; of type float64, float32 (other floats) or integer."""
    shape = tuple(spec.shape[batch_dims:])
    as_float = torch.float64 if spec.dtype is torch.float64 else torch.float32
    dtype = as_float if spec.dtype.is_floating_point else spec.dtype
    numpy_type: Any = torch.empty(0, dtype=dtype).numpy().dtype.type
    if isinstance(spec, Unbounded):
        if dtype.is_floating_point:
            return gym.spaces.Box(-np.inf, np.inf, shape, dtype=numpy_type)
        return gym.spaces.Box(torch.iinfo(dtype).min, torch.iinfo(dtype).max, shape, dtype=numpy_type)
    first = (0,) * batch_dims
    low, high = spec.space.low, spec.space.high
    if not ((low == low[first]).all() and (high == high[first]).all()):
        raise UsageError(f"TorchRL spec {_name(spec)}: the environments of the batch have different bounds")
    return gym.spaces.Box(low[first].to("cpu", dtype).numpy(), high[first].to("cpu", dtype).numpy(), shape, dtype=numpy_type)


def _name(spec: TensorSpec) -> str:
    return f"{type(spec).__name__} of shape {tuple(spec.shape)}" + ("" if isinstance(spec, Composite) else f", {spec.dtype}")
