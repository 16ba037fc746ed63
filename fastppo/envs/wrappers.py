"""Preprocessing of one environment, by gymnasium's wrappers where these fit. Does not import torch.

From the environment outwards: wrappers of the user's own in their order, time (TimeAwareObservation), frame skip, reward
weights, greyscale, resize, frame stack (FrameStackObservation), rescaled actions (rescale_box). For pictures this is the order
of DQN (Mnih et al., 2015) and OpenAI baselines. The time limit (TimeLimit, by gymnasium.make) is inside all of them, and counts
the environment's own steps.

Greyscale and resize apply to every picture of a Dict or Tuple observation. Stacked pictures are joined to one with more
channels, channels first; a stacked array of numbers to one vector. The first observation of an episode fills its stack.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Space, Tuple
from numpy.typing import NDArray

from fastppo.core.action_masks import leaf_spaces
from fastppo.core.space_rules import MIN_IMAGE_SIDE, is_image
from fastppo.envs.agents import AgentId, agents_of
from fastppo.envs.masks import has_mask
from fastppo.envs.numbered import REWARD_PARTS
from fastppo.envs.preprocessing import Preprocessing
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located, nearest
from fastppo.system.named import load_named

LARGE = 96  # pictures with a longer side are resized by default
DEFAULT_SIZE = (84, 84)  # of DQN
FAR = 4.0  # half of an action's range; rescaled by default where it is more, or less than 1/FAR, or does not hold 0
# keys of the metadata of an environment whose pictures or actions are changed by default: the size or the bounds before
RESIZED, RESCALED = "resized_from", "rescaled_from"

Function = Callable[[Any], Any]


def wrapped(env: gym.Env[Any, Any], settings: Preprocessing) -> gym.Env[Any, Any]:
    """`env` inside the wrappers that the settings ask for. Raises UsageError where one does not fit; names its flag."""
    if agents_of(env) is not None:
        return _wrapped_agents(env, settings)
    if settings.agent_id:
        raise UsageError("--agent-id is for environments of several agents, and this has one: leave it off")
    for name, kwargs in settings.wrappers:
        env = _own(env, name, kwargs)
    if settings.time_aware:
        env = _time_aware(env)
    if settings.frame_skip > 1:
        env = FrameSkip(env, settings.frame_skip)
    if settings.reward_weights is not None:
        env = WeightedReward(env, settings.reward_weights)
    is_automatic = settings.resize is None and any(map(_is_large, _pictures(env.observation_space)))
    if settings.grayscale or settings.resize not in (None, (0,)) or is_automatic:
        env = PictureObservation(env, settings)
    if settings.frame_stack > 1:
        env = _stacked(env, settings.frame_stack)
    if settings.rescale_action or (settings.rescale_action is None and _is_far(env.action_space)):
        env = _rescaled(env)
    return env


def _wrapped_agents(env: gym.Env[Any, Any], settings: Preprocessing) -> gym.Env[Any, Any]:
    """An `AgentsEnv` inside the wrapper that the settings ask for. Raises UsageError for those of one agent."""
    for flag in settings.flags:
        if flag != "--agent-id":
            raise UsageError(
                f"{flag} is for environments of one agent: wrap these with SuperSuit in a function of yours, and name that as "
                "module:NAME (docs/environments.md)"
            )
    return AgentId(env) if settings.agent_id else env


def _own(env: gym.Env[Any, Any], name: str, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    """`env` inside one --wrapper, called with it and the keyword arguments."""
    function = find_wrapper(name)
    try:
        made = function(env, **kwargs)
    except UsageError as error:
        raise UsageError(f"--wrapper {name}: {error}") from None
    except ENVIRONMENT_ERRORS as error:
        what = "its arguments do not fit: " if isinstance(error, TypeError) and "argument" in str(error) else ""
        raise UsageError(f"--wrapper {name}: {what}{located(error)}") from None
    if not isinstance(made, gym.Env):
        kind = "None" if made is None else f"a {type(made).__module__}.{type(made).__qualname__}"
        raise UsageError(f"--wrapper {name}: it returned {kind}, not a gymnasium Env")
    return made


def find_wrapper(name: str) -> Callable[..., Any]:
    """The function or class of a --wrapper. Raises UsageError with the nearest names."""
    if ":" not in name:
        import gymnasium.wrappers  # here: 0.2 s

        known = [f"gymnasium.wrappers:{key}" for key in gymnasium.wrappers.__all__]
        hint = nearest(f"gymnasium.wrappers:{name}", known) or ", such as gymnasium.wrappers:FlattenObservation"
        raise UsageError(f"--wrapper {name}: write module:NAME{hint}")
    found: Callable[..., Any] = load_named(name, "--wrapper")
    return found


class FrameSkip(gym.Wrapper[Any, Any, Any, Any]):
    """Repeats each action for `skip` steps, or until the episode ends. Rewards are summed; the observation is the last.

    Gymnasium's MaxAndSkipObservation returns the maximum of the last two observations instead, which is for Atari's flicker.
    """

    def __init__(self, env: gym.Env[Any, Any], skip: int) -> None:
        super().__init__(env)
        self.skip = skip
        fps = env.metadata.get("render_fps")
        if isinstance(fps, int | float):
            self.metadata = {**env.metadata, "render_fps": fps / skip}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        total: Any = 0.0
        for _ in range(self.skip):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total = total + np.asarray(reward)  # a vector, where it has parts
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class WeightedReward(gym.Wrapper[Any, Any, Any, Any]):
    """The weighted sum of a vector of rewards (linear scalarisation). The info has the vector, under REWARD_PARTS.

    mo-gymnasium's environments say in `reward_space` how many parts there are; others are known at the first step.
    """

    def __init__(self, env: gym.Env[Any, Any], weights: tuple[float, ...]) -> None:
        super().__init__(env)
        self.weights = np.array(weights, np.float64)
        space = env.get_wrapper_attr("reward_space") if env.has_wrapper_attr("reward_space") else None
        if isinstance(space, Box):
            self._check(space.shape)

    def _check(self, shape: tuple[int, ...]) -> None:
        """Raise UsageError unless there is a weight for each part of the reward."""
        if shape == ():
            raise UsageError("--reward-weights: the reward is one number; leave it off")
        if shape != self.weights.shape:
            parts = "x".join(map(str, shape))
            raise UsageError(
                f"--reward-weights takes a number for each of the {parts} parts of the reward, got {len(self.weights)}"
            )

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        parts = np.array(reward, np.float64)
        if parts.shape != self.weights.shape:
            self._check(parts.shape)
        return obs, float(parts @ self.weights), terminated, truncated, {**info, REWARD_PARTS: parts}


class PictureObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Gymnasium's GrayscaleObservation and ResizeObservation for every picture of an observation."""

    def __init__(self, env: gym.Env[Any, Any], settings: Preprocessing) -> None:
        super().__init__(env)
        pictures = list(_pictures(env.observation_space))
        if (settings.grayscale or settings.resize not in (None, (0,))) and not pictures:
            name = "--grayscale" if settings.grayscale else "--resize"
            space = type(env.observation_space).__name__
            raise UsageError(f"{name}: the observation, a {space}, has no picture (bytes, {MIN_IMAGE_SIDE} a side or more)")
        if settings.grayscale and not any(map(_is_coloured, pictures)):
            raise UsageError("--grayscale: the picture has no three colours; leave it off")
        self.observation_space, self._change = _changed(env.observation_space, settings)
        large = [picture for picture in pictures if _is_large(picture)]
        if settings.resize is None and large:
            height, width = _sides(large[0])
            self.metadata = {**env.metadata, RESIZED: f"{height} x {width}"}

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return self._change(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._change(obs), reward, terminated, truncated, info


class _Picture(gym.Env[Any, Any]):
    """A picture alone, for gymnasium's wrappers."""

    def __init__(self, space: Box) -> None:
        self.observation_space = space


def _changed(space: Space[Any], settings: Preprocessing) -> tuple[Space[Any], Function]:
    """An observation space with its pictures changed, and the function that changes an observation."""
    if isinstance(space, Dict | Tuple):
        return _rebuilt(space, partial(_changed, settings=settings))
    if not is_image(space):
        return space, lambda obs: obs
    return _changed_picture(space, settings)


def _rebuilt(space: Any, change: Callable[[Space[Any]], tuple[Space[Any], Function]]) -> tuple[Space[Any], Function]:
    """A Dict or Tuple in which each part is changed, and the function that changes each part of a value."""
    if isinstance(space, Dict):
        parts = {name: change(part) for name, part in space.spaces.items()}
        functions = {name: function for name, (_, function) in parts.items()}
        return Dict([(name, part) for name, (part, _) in parts.items()]), partial(_apply_to_dict, functions)
    pairs = [change(part) for part in space.spaces]
    each = [function for _, function in pairs]
    return Tuple([part for part, _ in pairs]), lambda values: tuple(f(part) for f, part in zip(each, values, strict=True))


def _apply_to_dict(functions: Mapping[str, Function], obs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: function(obs[name]) for name, function in functions.items()}


def _changed_picture(space: Any, settings: Preprocessing) -> tuple[Space[Any], Function]:
    """As `_changed`, for one picture."""
    from gymnasium.wrappers import GrayscaleObservation, ResizeObservation, TransformObservation  # here: 0.2 s

    env: gym.Env[Any, Any] = _Picture(space)
    if _is_channels_first(space):
        env = TransformObservation(env, _channels_last, Box(0, 255, (*space.shape[1:], space.shape[0]), np.uint8))
    if env.observation_space.shape[2:] == (1,):  # type: ignore[index]
        env = TransformObservation(env, _without_channel, Box(0, 255, env.observation_space.shape[:2], np.uint8))  # type: ignore[index]
    if settings.grayscale and _is_coloured(space):
        env = GrayscaleObservation(env)
    size = settings.resize
    if size is None:
        size = DEFAULT_SIZE if _is_large(space) else (0,)
    if size != (0,):
        try:
            env = ResizeObservation(env, (size[0], size[-1]))
        except gym.error.DependencyNotInstalled:
            raise UsageError(
                "--resize needs OpenCV: pip install 'fastppo[video]'"
                + (f", or keep pictures of {_text(space)} with --resize 0" if settings.resize is None else "")
            ) from None
    functions: list[Function] = []
    changed = env.observation_space
    while isinstance(env, TransformObservation):
        functions.insert(0, env.observation)
        env = env.env
    return changed, partial(_in_turn, functions)


def _in_turn(functions: list[Function], obs: Any) -> Any:
    for function in functions:
        obs = function(obs)
    return obs


def _time_aware(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    from gymnasium.wrappers import TimeAwareObservation  # here: 0.2 s

    space = env.observation_space
    is_vector = isinstance(space, Box) and space.dtype.kind == "f" and len(space.shape) == 1
    try:
        return TimeAwareObservation(env, flatten=is_vector, normalize_time=True)
    except ValueError:
        pass
    if isinstance(space, Dict) and "time" in space.spaces:
        raise UsageError("--time-aware: the observation has a part 'time' already; leave it off")
    raise UsageError("--time-aware needs a time limit, and the environment has none: add --max-episode-steps 1000")


def _stacked(env: gym.Env[Any, Any], number: int) -> gym.Env[Any, Any]:
    from gymnasium.wrappers import FlattenObservation, FrameStackObservation, TransformObservation  # here: 0.2 s

    if has_mask(env.observation_space):
        raise UsageError("--frame-stack: the observation has an action_mask, which cannot be stacked; give it in the info")
    single = env.observation_space
    try:
        env = FrameStackObservation(env, number)
    except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
        raise UsageError(f"--frame-stack: observations of {single} cannot be stacked ({error})") from None
    if isinstance(single, Box) and not is_image(single):
        return FlattenObservation(env)
    space, function = _joined(single, env.observation_space)
    return TransformObservation(env, function, space)


def _joined(single: Space[Any], stacked: Any) -> tuple[Space[Any], Function]:
    """The space of stacked observations with the channels of pictures joined, and the function that joins them.

    single: the space of one observation. stacked: that of several.
    """
    if isinstance(single, Dict):
        parts = {name: _joined(part, stacked[name]) for name, part in single.spaces.items()}
        functions = {name: function for name, (_, function) in parts.items()}
        return Dict({name: part for name, (part, _) in parts.items()}), partial(_apply_to_dict, functions)
    if isinstance(single, Tuple):
        pairs = [_joined(part, whole) for part, whole in zip(single.spaces, stacked.spaces, strict=True)]
        each = [function for _, function in pairs]
        return Tuple([part for part, _ in pairs]), lambda obs: tuple(f(part) for f, part in zip(each, obs, strict=True))
    if is_image(single) and len(stacked.shape) == 4:
        join = _join_planes if _is_channels_first(single) else join_channels
        return Box(0, 255, join(np.empty(stacked.shape, np.uint8)).shape, np.uint8), join
    return stacked, lambda obs: obs


def join_channels(obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Stacked pictures (..., K, H, W, C) -> (..., K * C, H, W)."""
    return _join_planes(np.moveaxis(obs, -1, -3))


def _join_planes(obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., K, C, H, W) -> (..., K * C, H, W)."""
    return obs.reshape(*obs.shape[:-4], -1, *obs.shape[-2:])


def _channels_last(obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.moveaxis(obs, 0, -1))


def _without_channel(obs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return obs[..., 0]


def _rescaled(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    from gymnasium.wrappers import TransformAction  # here: 0.2 s

    boxes = _boxes(env.action_space)
    if isinstance(env.action_space, Dict | Tuple) and not boxes:
        raise UsageError(f"--rescale-action needs a Box among the actions, and {env.action_space} has none: leave it off")
    space, function = _rescaled_space(env.action_space, is_part=isinstance(env.action_space, Dict | Tuple))
    rescaled = TransformAction(env, function, space)
    low, high = min(box.low.min() for box in boxes), max(box.high.max() for box in boxes)
    rescaled.metadata = {**env.metadata, RESCALED: f"{low:.4g} to {high:.4g}"}
    return rescaled


def _rescaled_space(space: Space[Any], is_part: bool) -> tuple[Space[Any], Function]:
    """An action space with its boxes rescaled to -1 to 1, and the function that turns its actions into the environment's.

    is_part: of a Dict or Tuple, in which other spaces stay as they are.
    """
    from gymnasium.wrappers.utils import rescale_box  # here: 0.2 s

    if isinstance(space, Dict | Tuple):
        return _rebuilt(space, partial(_rescaled_space, is_part=True))
    if is_part and not isinstance(space, Box):
        return space, lambda action: action
    if not (isinstance(space, Box) and space.dtype.kind == "f" and space.is_bounded()):
        raise UsageError(f"--rescale-action needs a Box action space with finite bounds, and this one is {space}: leave it off")
    low, high = space.low, space.high
    box, _, function = rescale_box(space, np.float32(-1.0), np.float32(1.0))
    # rounding may lead out of the bounds, and a range of 0 to nan
    return box, lambda action: np.fmin(np.fmax(function(action), low), high)


def _boxes(space: Space[Any]) -> list[Any]:
    """The Boxes of an action."""
    return [part for part in leaf_spaces(space) if isinstance(part, Box)]


def _is_far(space: Space[Any]) -> bool:
    """Whether a Gaussian of mean 0 and standard deviation 1 would leave most of an action's bounds, or of itself, unused."""
    boxes = _boxes(space)
    if not all(box.dtype.kind == "f" and box.is_bounded() and (box.high > box.low).all() for box in boxes):
        return False
    halves = [(box.high / 2 - box.low / 2, box.high / 2 + box.low / 2) for box in boxes]
    return any(((half > FAR) | (half < 1 / FAR) | (np.abs(centre) > half)).any() for half, centre in halves)


def _pictures(space: Space[Any]) -> list[Any]:
    """The spaces of the pictures in an observation."""
    return [part for part in leaf_spaces(space) if is_image(part)]


def _is_channels_first(space: Any) -> bool:
    return len(space.shape) == 3 and space.shape[0] <= space.shape[2]


def _sides(space: Any) -> tuple[int, int]:
    """Height and width."""
    return space.shape[1:] if _is_channels_first(space) else space.shape[:2]


def _is_large(space: Any) -> bool:
    return max(_sides(space)) > LARGE


def _is_coloured(space: Any) -> bool:
    return len(space.shape) == 3 and (space.shape[0] if _is_channels_first(space) else space.shape[2]) == 3


def _text(space: Any) -> str:
    return " x ".join(map(str, _sides(space)))
