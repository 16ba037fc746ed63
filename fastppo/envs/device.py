"""Environments that live on the device: two pure functions on tensors, the autoreset rule on them, and one wrapper.

Write `reset` and `step` for N copies at once (`DeviceEnv`) and wrap them:

    @dataclass(frozen=True)
    class Reach:
        goal: float = 1.0
        max_episode_steps: int | None = 50
        num_random: ClassVar[int] = 1
        observation_space: ClassVar[gym.Space] = Box(-np.inf, np.inf, (1,), np.float32)
        action_space: ClassVar[gym.Space] = Box(-1.0, 1.0, (1,), np.float32)

        def reset(self, random):
            return random[:, 0], random

        def step(self, state, action, random):
            state = state + 0.1 * action[:, 0]
            reached = (state - self.goal).abs() < 0.05
            return state, state[:, None], reached.float(), reached, torch.zeros_like(reached)

    gymnasium.register("Reach-v0", vector_entry_point=lambda num_envs, **kwargs: TorchVectorEnv(Reach(**kwargs), num_envs))

Knows nothing of policies, rollouts or compilation, and of no environment by name.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Dict, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fastppo.core.action_masks import leaf_spaces
from fastppo.core.space_rules import any_action
from fastppo.system.devices import resolved

State = Any  # a tensor, or a tuple, dict or NamedTuple of tensors, each (N, ...)
Action = Any  # a tensor (N, *action_shape); for a Dict or Tuple space a dict or tuple of such


class DeviceEnv(Protocol):
    """N copies of one environment as two pure functions on tensors with a leading N.

    Both return the same structure, shapes and dtypes on every call, write nothing in place and never ask the host for a value
    (no `.item()`, no `if tensor`, no mask indexing), so that they run eagerly, compiled, captured and under torch.func.vmap.
    They are called in the caller's own mode: gradients may be taken within, and none are taken through what is returned.
    """

    @property
    def observation_space(self) -> gym.Space[Any]:
        """Of one environment. Floating-point observations are float32, others of the space's own dtype."""
        ...

    @property
    def action_space(self) -> gym.Space[Any]:
        """Of one environment. Actions are of its own dtype; neither clipped nor checked. It may be a Dict or Tuple."""
        ...

    @property
    def max_episode_steps(self) -> int | None:
        """A time limit, at which `autoreset_step` truncates; None: no limit."""
        ...

    @property
    def num_random(self) -> int:
        """K, the number of uniform numbers in [0, 1) that each environment gets per reset or step."""
        ...

    def reset(self, random: Tensor) -> tuple[State, Tensor]:
        """First state and observation (N, *obs_shape) of N episodes; random (N, K) float32."""
        ...

    def step(self, state: State, action: Action, random: Tensor) -> tuple[State, Tensor, Tensor, Tensor, Tensor]:
        """One step of each.

        Args:
            state: as returned by `reset` or `step`.
            action: (N, *action_shape), or a dict or tuple of such.
            random: (N, K) float32.

        Returns:
            state, obs (N, *obs_shape), reward (N,) float32, terminated (N,) bool, truncated (N,) bool: truncated by the
            environment itself, not by the time limit.
        """
        ...


@runtime_checkable
class Draws(Protocol):
    """What a `DeviceEnv` has in addition if it can be rendered."""

    @property
    def render_fps(self) -> int:
        """Frames a second of a video."""
        ...

    def render_frame(self, state: State) -> NDArray[np.uint8]:
        """One environment as an image, (H, W, 3); state: its row of the state, tensors on the CPU without the leading N."""
        ...


class Running(NamedTuple):
    """N environments between two steps."""

    state: State
    obs: Tensor  # (N, *obs_shape)
    elapsed: Tensor  # (N,) int32, steps of the running episode
    done: Tensor  # (N,) bool: the last step ended the episode, so the next one resets


class StepResult(NamedTuple):
    """The result of one step; leading axis N."""

    obs: Tensor  # (N, *obs_shape)
    reward: Tensor  # (N,) float32
    terminated: Tensor  # (N,) bool
    truncated: Tensor  # (N,) bool


def start(env: DeviceEnv, random: Tensor) -> Running:
    """The start of N episodes; random (N, K) float32.

    Its tensors are contiguous and share no memory, as those of `autoreset_step`: compiled programs and CUDA graphs need both.
    """
    state, obs = tree_map(partial(torch.clone, memory_format=torch.contiguous_format), _detached(env.reset(random)))
    elapsed = torch.zeros(random.shape[:1], dtype=torch.int32, device=random.device)
    return Running(state, obs, elapsed, torch.zeros_like(elapsed, dtype=torch.bool))


def autoreset_step(env: DeviceEnv, running: Running, action: Action, random: Tensor) -> tuple[Running, StepResult]:
    """One step under gymnasium's NEXT_STEP rule (see envs/autoreset.py) and the environment's time limit; pure.

    Where `running.done`, the environment resets: its action is ignored, its reward 0, it is neither terminated nor truncated,
    and its observation is the first of the new episode. An environment uses a row of `random` for a reset or for a step,
    never for both.

    Args:
        action: as `DeviceEnv.step` takes it. random: (N, K) float32, fresh for this step.
    """
    resetting = running.done
    first_state, first_obs = _detached(env.reset(random))
    state, obs, reward, terminated, truncated = _detached(env.step(running.state, action, random))
    elapsed = running.elapsed + 1
    if env.max_episode_steps is not None:
        truncated = truncated | (elapsed >= env.max_episode_steps)
    choose = partial(_where, resetting)
    obs = choose(first_obs, obs)
    terminated, truncated = terminated & ~resetting, truncated & ~resetting
    result = StepResult(obs, reward.masked_fill(resetting, 0.0), terminated, truncated)
    state = tree_map(choose, first_state, state)
    return Running(state, obs, elapsed.masked_fill(resetting, 0), terminated | truncated), result


def _detached(tree: Any) -> Any:
    """Detach all tensors, since an environment may contain a network and record gradients."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) and x.requires_grad else x, tree)


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of `yes` (N, ...) where mask (N,), else of `no`; contiguous."""
    return torch.where(mask.reshape(mask.shape + (1,) * (no.ndim - mask.ndim)), yes, no).contiguous()


class TorchVectorEnv(VectorEnv[Tensor, Any, Tensor]):
    """A `DeviceEnv` as a gymnasium vector environment: NEXT_STEP autoreset, tensors on its device out, tensors or arrays in.

    Attributes:
        env: the `DeviceEnv`.
        device: where its tensors live.
        running: the environments between two steps. A program that steps them itself reads it and sets it afterwards; reading
            it before the first reset raises gymnasium.error.ResetNeeded.
        generator: the torch.Generator of all its random numbers, on its device.
        share: (k, K): these are the k-th of K equal parts of environments with one generator. Each part draws the numbers of
            all parts and uses its own.
    """

    def __init__(
        self, env: DeviceEnv, num_envs: int, device: torch.device | str = "cpu", render_mode: str | None = None
    ) -> None:
        """Try one reset and one step to see that `env` keeps the contract: structure, shapes and dtypes, no values.

        Args:
            num_envs: N, at least 1.
            render_mode: None or "rgb_array", the latter for environments with a `render_frame` (see `Draws`).

        Raises:
            ValueError: num_envs, render_mode, max_episode_steps or a result of the environment is not as required.
        """
        name, limit = type(env).__name__, env.max_episode_steps
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number from 1 on, not {num_envs!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"{name}: max_episode_steps must be None or a whole number from 1 on, not {limit!r}")
        modes = ["rgb_array"] if isinstance(env, Draws) else []
        if render_mode is not None and render_mode not in modes:
            has = "only 'rgb_array'" if modes else "none: it has no render_frame and render_fps"
            raise ValueError(f"{name} has no render mode {render_mode!r}; it has {has}")
        self.env = env
        self.num_envs = num_envs
        self.device = resolved(device)
        self.render_mode = render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": modes}
        if isinstance(env, Draws):
            self.metadata["render_fps"] = env.render_fps
        self.single_observation_space = copy.deepcopy(env.observation_space)  # a copy, since a space has a generator
        self.single_action_space = copy.deepcopy(env.action_space)
        _check_contract(env, num_envs, self.device)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()
        self.share = (0, 1)
        self._running: Running | None = None

    @property
    def running(self) -> Running:
        if self._running is None:
            raise gym.error.ResetNeeded(f"{self}: reset before the first step")
        return self._running

    @running.setter
    def running(self, running: Running) -> None:
        self._running = running

    def draw(self, *leading: int) -> Tensor:
        """Random numbers for a reset or a step, (*leading, N, K) float32 in [0, 1), from `generator`."""
        part, parts = self.share
        shape = (*leading, parts * self.num_envs, self.env.num_random)
        random = torch.rand(shape, generator=self.generator, dtype=torch.float32, device=self.device)
        return random if parts == 1 else random.unflatten(-2, (parts, -1)).select(-3, part).contiguous()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start all environments anew.

        Args:
            seed: of all random numbers from here on; None: they continue, at first from the system's entropy.

        Returns:
            obs (N, *obs_shape), {}.

        Raises:
            ValueError: there are options: no environment on the device takes any.
        """
        if options:
            raise ValueError(f"{self} takes no reset options: {', '.join(map(str, options))}")
        super().reset(seed=seed)
        if seed is not None:
            self.generator.manual_seed(int(seed))
        self.running = start(self.env, self.draw())
        return self.running.obs, {}

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Step all environments; those that ended in the last step reset instead (see `autoreset_step`).

        Args:
            actions: (N, *action_shape), an array or a tensor of any dtype and device, or a dict or tuple of such. Values are
                not checked: that would wait for the device.

        Returns:
            obs (N, *obs_shape), reward (N,) float32, terminated (N,) bool, truncated (N,) bool, {}.

        Raises:
            ValueError: `actions` has another shape.
            gymnasium.error.ResetNeeded: before the first reset.
        """
        running = self.running
        self.running, result = self.advance(running, _for_leaves(self._own, self.single_action_space, actions))
        return *result, {}

    def _own(self, space: gym.Space[Any], batch: Any) -> Tensor:
        """A leaf of the actions as a tensor of its space's dtype. Raises ValueError for another shape."""
        action = torch.as_tensor(batch, device=self.device).to(_action_dtype(space))
        expected = (self.num_envs, *(space.shape or ()))
        if action.shape != expected:
            raise ValueError(f"{self}: actions must have shape {expected}, not {tuple(action.shape)}")
        return action

    def advance(self, running: Running, action: Action) -> tuple[Running, StepResult]:
        """`autoreset_step` with numbers from `generator`."""
        return autoreset_step(self.env, running, action, self.draw())

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A frame (H, W, 3) of each environment; None, and a warning, without a render mode.

        Raises:
            UsageError: what draws is not installed.
        """
        if self.render_mode is None or not isinstance(self.env, Draws):
            gym.logger.warn(f"{self}: render() without a render mode; make it with render_mode='rgb_array'")
            return None
        state = tree_map(Tensor.cpu, self.running.state)  # sync: for the viewer
        rows = (tree_map(lambda leaf, index=index: leaf[index], state) for index in range(self.num_envs))
        return tuple(self.env.render_frame(row) for row in rows)


def _for_leaves(function: Callable[..., Any], space: gym.Space[Any], *values: Any) -> Any:
    """function(leaf of the space, leaf of each value) in the structure of the space."""
    if isinstance(space, Dict):
        return {name: _for_leaves(function, part, *(x[name] for x in values)) for name, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_for_leaves(function, part, *(x[i] for x in values)) for i, part in enumerate(space.spaces))
    return function(space, *values)


def _action_dtype(space: gym.Space[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype


def _obs_dtype(space: gym.Space[Any]) -> torch.dtype:
    is_float = np.issubdtype(space.dtype, np.floating)
    return torch.float32 if is_float else torch.from_numpy(np.empty(0, space.dtype)).dtype


def _any_actions(num_envs: int, device: torch.device, space: gym.Space[Any]) -> Tensor:
    """The same legal action for each of N environments."""
    return torch.as_tensor(np.stack([any_action(space)] * num_envs), device=device).to(_action_dtype(space))


def _check_contract(env: DeviceEnv, num_envs: int, device: torch.device) -> None:
    """Raises ValueError that names the first thing of `env` that breaks the contract of `DeviceEnv`."""
    name = type(env).__name__
    if env.observation_space.shape is None or env.observation_space.dtype is None:
        raise ValueError(f"{name}.observation_space is {env.observation_space}: one tensor has to hold it")
    for leaf in leaf_spaces(env.action_space):
        if leaf.shape is None or leaf.dtype is None:
            raise ValueError(f"{name}.action_space is {env.action_space}: a tensor has to hold each part")

    def check(what: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or found.shape != shape or found.dtype != dtype:
            raise ValueError(f"{name}.{what} must be a tensor {shape} {dtype}, not {got}")

    random = torch.zeros((num_envs, env.num_random), dtype=torch.float32, device=device)
    first_state, first_obs = env.reset(random)
    action = _for_leaves(partial(_any_actions, num_envs, device), env.action_space)
    state, obs, reward, terminated, truncated = env.step(first_state, action, random)
    obs_shape = (num_envs, *(env.observation_space.shape or ()))
    check("reset: obs", first_obs, obs_shape, _obs_dtype(env.observation_space))
    check("step: obs", obs, obs_shape, _obs_dtype(env.observation_space))
    check("step: reward", reward, (num_envs,), torch.float32)
    check("step: terminated", terminated, (num_envs,), torch.bool)
    check("step: truncated", truncated, (num_envs,), torch.bool)
    (first_leaves, first_tree), (leaves, tree) = tree_flatten(first_state), tree_flatten(state)
    if first_tree != tree:
        raise ValueError(f"{name}.step: state must have the structure of reset's, {first_tree}, not {tree}")
    for first, leaf in zip(first_leaves, leaves, strict=True):
        if not isinstance(first, Tensor) or first.shape[:1] != (num_envs,):
            raise ValueError(f"{name}.reset: state must be tensors with a leading axis of {num_envs} environments")
        check("step: a tensor of the state", leaf, tuple(first.shape), first.dtype)
