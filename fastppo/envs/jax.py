"""Environments that are functions of JAX, N of them as a gymnasium vector environment of tensors.

One compiled function steps all environments and resets those that ended: SAME_STEP with a dense final_obs. Tensors and arrays
of JAX share memory where both are on one device. Importing this module imports jax, so only envs/jax_packages.py imports it.
Knows no package by name, and nothing of policies.

    def make(num_envs):  # --env-id my_module:make
        return JaxVectorEnv(of_gymnax(MyEnv(), MyEnv().default_params), num_envs)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastppo.core.space_rules import any_action
from fastppo.errors import UsageError

Key = Any  # a key of jax.random, (2,) uint32
State = Any  # arrays of JAX in any structure
Array = Any  # of JAX
SEEDS = 2**32  # jax.random.PRNGKey takes 32 bits


class JaxEnv(NamedTuple):
    """One environment as pure functions of JAX, which are called under jit and vmap."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    reset: Callable[[Key], tuple[State, Any]]
    """The first state and observation of an episode."""
    step: Callable[[Key, State, Array], tuple[State, Any, Array, Array, Array]]
    """State, observation, reward, terminated, truncated. It must not reset itself."""
    max_episode_steps: int | None = None
    """A time limit beside those of `step`, told as truncation; None: there is none."""
    render: Callable[[State], NDArray[np.uint8]] | None = None
    """An image (H, W, 3) of a state, outside of jit."""
    render_fps: int = 30


class Running(NamedTuple):
    """N environments between two steps; leading axis N."""

    state: State
    key: Key  # (N, 2) uint32
    elapsed: Array  # (N,) int32, steps of the running episode


class Outcome(NamedTuple):
    """What a step of N environments returns; leading axis N."""

    obs: Any  # the next episode's first where one has ended
    reward: Array  # float32
    terminated: Array  # bool
    truncated: Array  # bool
    final_obs: Any  # what the step itself led to


def start(env: JaxEnv, keys: Key) -> tuple[Running, Any]:
    """New episodes, and their first observations; keys: (N, 2)."""
    own, first = _split(keys, 2)
    state, obs = jax.vmap(partial(_first, env))(first)
    return Running(state, own, jnp.zeros(len(keys), jnp.int32)), obs


def autoreset_step(env: JaxEnv, running: Running, action: Array) -> tuple[Running, Outcome]:
    """One step of N environments, and a reset of those whose episode ended in it; pure.

    Environment i draws from its own key alone, so it goes the same way beside any number of others.
    """
    own, for_step, for_reset = _split(running.key, 3)
    state, obs, reward, terminated, truncated = jax.vmap(partial(_stepped, env))(for_step, running.state, action)
    elapsed = running.elapsed + 1
    if env.max_episode_steps is not None:
        truncated = truncated | (elapsed >= env.max_episode_steps)
    done = terminated | truncated

    def reset() -> tuple[State, Any]:
        first = jax.vmap(partial(_first, env))(for_reset)
        return jax.tree.map(partial(_where, done), first, (state, obs))

    # a reset of all is computed in steps in which an episode ended
    after, next_obs = jax.lax.cond(done.any(), reset, lambda: (state, obs))
    running = Running(after, own, jnp.where(done, 0, elapsed))
    return running, Outcome(next_obs, reward, terminated, truncated & ~terminated, obs)


def _split(keys: Key, number: int) -> Sequence[Key]:
    """`number` keys (N, 2) each, made from (N, 2)."""
    return tuple(jnp.moveaxis(jax.vmap(partial(jax.random.split, num=number))(keys), 1, 0))


def _stepped(env: JaxEnv, key: Key, state: State, action: Array) -> tuple[Any, ...]:
    state, obs, reward, terminated, truncated = env.step(key, state, action)
    flags = (jnp.asarray(flag, bool).reshape(()) for flag in (terminated, truncated))
    return (
        jax.tree.map(_strong, state),
        _as_space(env.observation_space, obs),
        jnp.asarray(reward, jnp.float32).reshape(()),
        *flags,
    )


def _first(env: JaxEnv, key: Key) -> tuple[State, Any]:
    """The start of an episode, with arrays of the types that a step returns, so that both fit and nothing is compiled twice."""
    state, obs = env.reset(key)
    action = jax.tree.map(jnp.asarray, any_action(env.action_space).astype(_dtype(env.action_space)))
    like, _, reward, *_ = jax.eval_shape(env.step, key, state, action)  # of a copy of the state, whose dicts a step may change
    if reward.size != 1:
        raise UsageError(f"its reward has the shape {reward.shape}: environments of several agents are not supported for JAX")
    return jax.tree.map(lambda x, wanted: _strong(x, wanted.dtype), state, like), _as_space(env.observation_space, obs)


def _strong(x: Any, dtype: Any = None) -> Array:
    """An array of that type, which is no longer a number of Python's to JAX."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, np.dtype(dtype or x.dtype))


def _as_space(space: gym.Space[Any], obs: Any) -> Any:
    """An observation in the structure, shapes and types of its space, of 32 bits where that has 64."""
    if isinstance(space, Dict):
        named = obs if isinstance(obs, Mapping) else obs._asdict() if hasattr(obs, "_asdict") else vars(obs)
        return {name: _as_space(part, named[name]) for name, part in space.spaces.items()}
    return jnp.asarray(obs).astype(_dtype(space)).reshape(space.shape or ())


def _where(mask: Array, yes: Array, no: Array) -> Array:
    """Rows of `yes` where mask (N,), else of `no`."""
    return jnp.where(mask.reshape(mask.shape + (1,) * (no.ndim - mask.ndim)), yes, no)


def _dtype(space: gym.Space[Any]) -> Any:
    """The type of JAX's arrays for a space: of 32 bits where the space has 64."""
    wide = {np.dtype(np.float64): np.dtype(np.float32), np.dtype(np.int64): np.dtype(np.int32)}
    return wide.get(np.dtype(space.dtype), np.dtype(space.dtype))


class JaxVectorEnv(VectorEnv[Any, Any, Any]):
    """N copies of a `JaxEnv`: SAME_STEP autoreset, tensors out, tensors or arrays in.

    Environment i of a seed goes the same way whatever N is: its key is that of seed + i.
    """

    def __init__(
        self, env: JaxEnv, num_envs: int, device: torch.device | str | None = None, render_mode: str | None = None
    ) -> None:
        """
        Args:
            device: of the policy. JAX computes there if it can, else on the CPU. None: on JAX's first device.
            render_mode: None or "rgb_array", the latter for environments with `render`.

        Raises:
            UsageError: an action space that is not supported, or a render mode that it does not have.
        """
        if not isinstance(env.action_space, Discrete | MultiDiscrete | MultiBinary | Box):
            raise UsageError(
                f"action space {env.action_space} is not supported for JAX; supported: Discrete, MultiDiscrete, Box"
            )
        modes = [] if env.render is None else ["rgb_array"]
        if render_mode is not None and render_mode not in modes:
            raise UsageError(f"it has no render mode {render_mode}; its render modes: {', '.join(modes) or 'none'}")
        self.env, self.num_envs, self.render_mode = env, num_envs, render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": modes, "render_fps": env.render_fps}
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.jax_device = _jax_device(device)
        self._start = jax.jit(partial(start, env))
        self._step = jax.jit(partial(autoreset_step, env))
        self._running: Running | None = None
        self._held: Any = None  # what the last step read and returned: CUDA may still read it

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start all environments anew.

        Args:
            seed: of all random numbers from here on, or one for each environment; None: they continue, at first from the
                system's entropy.
            options: not used.

        Returns:
            obs (N, *obs_shape), {}.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None and self._running is None:
            seed = int(self.np_random.integers(SEEDS))
        if self.jax_device.platform != "cpu" and torch.cuda.is_available():
            torch.cuda.synchronize()  # sync: once per reset. JAX may write where torch still reads what it was lent
        if seed is None:
            keys = self.running.key
        else:
            each = np.arange(seed, seed + self.num_envs) if isinstance(seed, int) else np.asarray(seed)
            keys = jax.vmap(jax.random.PRNGKey)(jax.device_put((each % SEEDS).astype(np.uint32), self.jax_device))
        self._running, obs = self._start(keys)
        return self._to_torch(self.single_observation_space, obs), {}

    @property
    def running(self) -> Running:
        """The environments between two steps. Raises gymnasium.error.ResetNeeded before the first reset."""
        if self._running is None:
            raise gym.error.ResetNeeded(f"{self}: reset before the first step")
        return self._running

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step all environments, and reset those that ended.

        Args:
            actions: (N, *action_shape), a tensor or an array.

        Returns:
            obs (N, *obs_shape), reward (N,) float32, terminated (N,) bool, truncated (N,) bool, and final_obs in all rows.

        Raises:
            ValueError: `actions` has another shape.
        """
        action = self._to_jax(actions)
        self._running, outcome = self._step(self.running, action)
        self._held = action, outcome
        obs, final_obs = (self._to_torch(self.single_observation_space, x) for x in (outcome.obs, outcome.final_obs))
        reward, terminated, truncated = map(from_dlpack, (outcome.reward, outcome.terminated, outcome.truncated))
        info = {"final_obs": final_obs, "_final_obs": terminated | truncated}
        return obs, reward, terminated, truncated, info

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """An image (H, W, 3) of each environment; None without a render mode."""
        if self.env.render is None or self.render_mode is None:
            return None
        state = jax.device_get(self.running.state)
        rows = (jax.tree.map(lambda leaf, index=index: leaf[index], state) for index in range(self.num_envs))
        return tuple(np.asarray(self.env.render(row)) for row in rows)

    def _to_torch(self, space: gym.Space[Any], obs: Any) -> Any:
        """Tensors of the space's types; of another structure never."""
        if isinstance(space, Dict):
            return {name: self._to_torch(part, obs[name]) for name, part in space.spaces.items()}
        tensor = from_dlpack(obs)
        return tensor.long() if np.dtype(space.dtype) == np.int64 else tensor

    def _to_jax(self, actions: Any) -> Array:
        action = torch.as_tensor(actions)
        expected = (self.num_envs, *(self.single_action_space.shape or ()))
        if action.shape != expected:
            raise ValueError(f"{self}: actions must have shape {expected}, not {tuple(action.shape)}")
        dtype = torch.from_numpy(np.empty(0, _dtype(self.single_action_space))).dtype
        action = action.detach().to(dtype).contiguous()
        if action.device.type == "cpu":  # an array of numpy: 10 us where from_dlpack takes 170
            return action.numpy() if self.jax_device.platform == "cpu" else jax.device_put(action.numpy(), self.jax_device)
        array = jax.dlpack.from_dlpack(action)
        return array if array.device == self.jax_device else jax.device_put(array, self.jax_device)


def _jax_device(device: torch.device | str | None) -> Any:
    """The device of JAX that is torch's; its CPU where it has no such."""
    _dispatch_at_once()
    if device is None:
        return jax.local_devices()[0]
    wanted = torch.device(device)
    if wanted.type == "cuda":
        try:
            found = jax.local_devices(backend="cuda")
        except RuntimeError:  # JAX was installed without CUDA
            found = []
        index = torch.cuda.current_device() if wanted.index is None else wanted.index
        if index < len(found):
            return found[index]
    return jax.local_devices(backend="cpu")[0]


def _dispatch_at_once() -> None:
    """Make the CPU of JAX compute in the thread that calls it, unless a caller has started JAX before; others keep the setting.

    Eight CartPoles of gymnax took half the time for a step (736 instead of 1,632 us of CPU time): no thread is waited for.
    """
    before = jax.config.values["jax_cpu_enable_async_dispatch"]
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.local_devices(backend="cpu")  # reads it, once
    jax.config.update("jax_cpu_enable_async_dispatch", before)
