"""Map an environment's observation and action spaces to tensors. Knows nothing of networks or learning.

An observation is one tensor or several: a Dict or Tuple is split into leaves. Each leaf has its own key in the rollout and is
stored as the environment returns it (images stay uint8). An action mask, if the environment has one, is one more leaf.
The rollout stores actions as sampled, the leaves of a Dict or Tuple in one tensor. Bounds are applied only on the way to the
environment, so PPO compares log-probabilities of the sampled actions.
"""

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, OneOf, Tuple
from numpy.typing import NDArray
from torch import Tensor

from fastppo.core.space_rules import NO_BOUND, is_image_shape, is_pixels
from fastppo.errors import UsageError
from fastppo.policy.distributions import (
    BETA,
    CATEGORICAL,
    CONTINUOUS,
    Family,
    Hybrid,
    MultiCategorical,
    choices,
    continuous_of,
    num_components,
)

ACTION_MASK = "action_mask"  # key of the legal actions, in a Dict observation, in an info and in the rollout
MAX_NESTING = 16  # of a space in a checkpoint


@dataclass(frozen=True)
class ObsLeaf:
    """One tensor of an observation: its place in the observation, how it is stored, and how the networks read it.

    key: in the rollout. path: to it through Dicts and Tuples. shape, dtype: of one environment, as stored.
    kind: "vector", numbers as they are, times `scale`; "categories", integers, each turned into a one-hot vector; "image",
    pixels times `scale`, for a convolutional network; "mask", the legal actions, no input of the networks.
    categories: (first value, number of values) of each component.
    """

    key: str
    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Literal["vector", "categories", "image", "mask"]
    scale: float = 1.0
    categories: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Number of inputs that the networks get from it, an image's pixels included."""
        return sum(number for _, number in self.categories) if self.kind == "categories" else math.prod(self.shape)

    def find(self, obs: Any) -> Any:
        """This leaf of an observation of the environment."""
        for name in self.path:
            obs = obs[name]
        return obs


@dataclass(frozen=True)
class ObsSpec:
    """The observation of one environment: leaves in the order of their keys."""

    leaves: tuple[ObsLeaf, ...]

    def __iter__(self) -> Iterator[ObsLeaf]:
        return iter(self.leaves)

    @property
    def observed(self) -> tuple[ObsLeaf, ...]:
        """All but the mask."""
        return tuple(leaf for leaf in self.leaves if leaf.kind != "mask")

    @property
    def has_images(self) -> bool:
        """Whether a convolutional network is needed."""
        return any(leaf.kind == "image" for leaf in self.leaves)

    @property
    def normalized(self) -> tuple[ObsLeaf, ...]:
        """The leaves that --norm-obs normalises: numbers of unknown scale."""
        numbers = (leaf for leaf in self.leaves if leaf.kind == "vector" and leaf.dtype is not torch.bool)
        return tuple(leaf for leaf in numbers if leaf.scale == 1.0)

    @property
    def wide(self) -> frozenset[str]:
        """Keys of the normalised leaves that float32 cannot hold exactly: their mean is subtracted in float64."""
        return frozenset(leaf.key for leaf in self.normalized if leaf.dtype.itemsize >= 4 and leaf.dtype is not torch.float32)

    @property
    def is_plain(self) -> bool:
        """Whether it is one vector (D,), which needs no encoder."""
        (first, *others) = self.leaves
        return not others and first.key == "obs" and first.dtype.is_floating_point and len(first.shape) == 1

    @property
    def info_mask(self) -> ObsLeaf | None:
        """The action mask, if it comes in the info."""
        return next((leaf for leaf in self.leaves if leaf.kind == "mask" and not leaf.path), None)

    def join(self, leaves: Mapping[str, Any]) -> Any:
        """The networks' input (core.contracts.Obs): the tensor of a plain space without a mask, else all by key."""
        if len(self.leaves) == 1 and self.leaves[0].key == "obs":
            return leaves["obs"]
        return {leaf.key: leaves[leaf.key] for leaf in self.leaves}


def obs_spec(
    space: gym.Space[Any],
    info_mask_size: int | None = None,
    action: "ActionSpec | None" = None,
    normalize: bool | Collection[str] = False,
) -> ObsSpec:
    """The leaves of an observation space.

    Args:
        info_mask_size: numbers in each environment's info["action_mask"]; None: there is none.
        action: the actions that a mask has to fit.
        normalize: whether observations will be normalised, or the keys of the leaves that will. Of these float64 is stored as
            float64, and bytes that are no image are numbers as they are. Others are stored as float32, and divided by 255.

    Raises:
        UsageError: a space that is not supported, or a mask that does not fit the actions.
    """
    leaves = list(_leaves(space, "obs", (), space))
    if info_mask_size is not None:
        leaves.append(ObsLeaf(ACTION_MASK, (), (info_mask_size,), torch.bool, "mask"))
    _check_structure("observation", [leaf for leaf in leaves if leaf.kind != "mask"])
    masks = [leaf for leaf in leaves if leaf.kind == "mask"]
    if len(masks) > 1:
        raise UsageError("--env-id: the environment tells its action_mask twice, in the observation and in the info")
    if len(masks) == len(leaves):
        raise UsageError(f"--env-id: observation space {space} has nothing to observe")
    for mask in masks:
        if action is not None and mask.size != action.num_logits:
            raise UsageError(
                f"--env-id: an action_mask of {mask.size} numbers does not fit the action space {action.space}"
                + (f", which has {action.num_logits} choices" if action.num_logits else "")
            )
    normalized = {leaf.key for leaf in leaves} if normalize is True else set(normalize or ())
    for number, leaf in enumerate(leaves):
        if leaf.key not in normalized and leaf.dtype is torch.float64:
            leaves[number] = replace(leaf, dtype=torch.float32)
        elif leaf.key in normalized and leaf.kind == "vector":
            leaves[number] = replace(leaf, scale=1.0)
    return ObsSpec(tuple(sorted(leaves, key=lambda leaf: leaf.key)))


def _leaves(
    space: gym.Space[Any], key: str, path: tuple[str | int, ...], whole: gym.Space[Any] | None = None
) -> Iterator[ObsLeaf]:
    """The leaves of a space. An empty part, like Box(shape=(0,)), has none. whole: the observation space, for the error."""
    if isinstance(space, Box | MultiDiscrete | MultiBinary) and not math.prod(space.shape):
        return
    if isinstance(space, Dict | Tuple):
        parts: Any = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
        for name, part in parts:
            if name == ACTION_MASK and not path:
                if not isinstance(part, Box | MultiBinary | MultiDiscrete):
                    raise UsageError(
                        f"--env-id: {ACTION_MASK} is {part}; supported: MultiBinary, or Box or MultiDiscrete of 0 and 1"
                    )
                yield ObsLeaf(ACTION_MASK, (name,), (math.prod(part.shape),), torch.bool, "mask")
            else:
                yield from _leaves(part, f"{key}.{name}", (*path, name), whole)
    elif isinstance(space, Discrete):
        yield ObsLeaf(key, path, (), torch.int64, "categories", categories=((int(space.start), int(space.n)),))
    elif isinstance(space, MultiDiscrete):
        categories = zip(space.start.flatten().tolist(), space.nvec.flatten().tolist(), strict=True)
        yield ObsLeaf(key, path, space.shape, torch.int64, "categories", categories=tuple(categories))
    elif isinstance(space, MultiBinary):
        yield ObsLeaf(key, path, space.shape, torch.bool, "vector")
    elif isinstance(space, Box):
        if np.issubdtype(space.dtype, np.floating):
            dtype = torch.float64 if np.dtype(space.dtype).itemsize > 4 else torch.float32
        else:
            dtype = _torch_dtype(space)
        pixels = is_pixels(space)
        kind: Any = "image" if pixels and is_image_shape(space.shape) else "vector"
        yield ObsLeaf(key, path, space.shape, dtype, kind, 1.0 / 255.0 if pixels else 1.0)
    else:
        raise UsageError(
            f"--env-id: observation space {space}{_where(path)} is not supported; supported: Box, Discrete, MultiDiscrete, "
            f"MultiBinary, and Dict and Tuple of these; {_left_out(whole)}pad it to a Box with a gymnasium.ObservationWrapper"
        )


def _left_out(space: gym.Space[Any] | None) -> str:
    """The flag that keeps only the supported parts of a Dict or Tuple, for the error that one is not; "" if none is."""
    parts: Any = space.spaces.items() if isinstance(space, Dict) else enumerate(space) if isinstance(space, Tuple) else ()
    kept = []
    for name, part in parts:
        with contextlib.suppress(UsageError):
            list(_leaves(part, "obs", (name,)))
            kept.append(name)
    flag = f"--wrapper gymnasium.wrappers:FilterObservation 'filter_keys={json.dumps(kept, separators=(',', ':'))}'"
    return f"leave it out: {flag}, or " if kept else ""


@dataclass(frozen=True)
class ActionLeaf:
    """One tensor of an action: its place in the action and among the stored numbers, and how the environment gets it.

    key: "action", or "action.name" of a part of a Dict or Tuple. path: to it through these.
    numbers: the number of values of each choice; () for a Box. first: the place of its first stored number.
    low, high: (A,) of env_dtype, for a Box; low (K,), the first value of each choice, for a MultiDiscrete or MultiBinary.
    to_bounds: how the numbers of a Box are brought within its bounds: clipped, by tanh, or from [0, 1] linearly.
    """

    key: str
    path: tuple[str | int, ...]
    space: gym.Space[Any]
    numbers: tuple[int, ...]
    env_dtype: torch.dtype
    low: Tensor
    high: Tensor
    to_bounds: Literal["clip", "tanh", "linear"] = "clip"
    first: int = 0

    @property
    def width(self) -> int:
        """How many stored numbers it has: its choices, or its components."""
        return len(self.numbers) or math.prod(self.space.shape or ())

    def find(self, action: Any) -> Any:
        """This leaf of an action of the environment."""
        for name in self.path:
            action = action[name]
        return action

    def to_env(self, stored: Tensor) -> Tensor:
        """Stored numbers (N, width), of a Discrete (N,), -> (N, ...) for the environments: shifted, or brought within bounds.

        Numbers of a Box, MultiDiscrete or MultiBinary must be on the device of the bounds: the CPU, or the one given to `to`.
        """
        if isinstance(self.space, Discrete):
            return (stored + int(self.space.start) if self.space.start else stored).to(self.env_dtype)
        if self.numbers:
            stored = stored + self.low
        else:
            if self.to_bounds != "clip":
                halves = stored.tanh() + 1.0 if self.to_bounds == "tanh" else 2.0 * stored  # in [0, 2]
                stored = self.low + halves * (0.5 * self.high - 0.5 * self.low)
            # in the environment's dtype: a bound rounded to float32 may lie outside the space
            stored = torch.minimum(torch.maximum(stored.to(self.env_dtype), self.low), self.high)
        return stored.to(self.env_dtype).reshape(*stored.shape[:-1], *(self.space.shape or ()))

    def to_env_array(self, stored: Tensor) -> NDArray[Any]:
        """`to_env` for environments of arrays: a new array, from numbers on the CPU. The same bits.

        Between two steps of an environment, with a cold cache, `to_env` of a Box takes 52 us and this 23.
        """
        array = stored.numpy()
        if isinstance(self.space, Discrete):
            return (array + int(self.space.start)).astype(self.space.dtype, copy=False)
        if self.to_bounds != "clip" or self.numbers:
            return self.to_env(stored).numpy()  # a new array already
        low, high = self._bounds
        clipped = np.minimum(np.maximum(array.astype(low.dtype), low), high)
        return clipped.reshape(*array.shape[:-1], *(self.space.shape or ()))

    @cached_property
    def _bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.low.numpy(), self.high.numpy()

    def chosen(self, action: Any) -> Tensor:
        """The choices of actions (N, ...) as `to_env` returns them: (N, K) int64, counted from 0."""
        array = np.asarray(action).astype(np.int64).reshape(len(action), -1)
        return torch.from_numpy(array - np.ravel(getattr(self.space, "start", 0)).astype(np.int64))


@dataclass(frozen=True)
class ActionSpec:
    """An action of one environment: its distribution, how it is stored, and how the environment gets it.

    A Dict or Tuple is taken apart into leaves, in the order of the space. A stored action is one row of numbers: the choices of
    all leaves, then the components of all leaves. Outputs of a network are in the same order: logits, then means.
    """

    space: gym.Space[Any]
    leaves: tuple[ActionLeaf, ...]
    distribution: Family
    size: int  # A: logits and what the network gives out for the components
    shape: tuple[int, ...]  # as stored: () for a Discrete, else (K + C,), K choices and C components
    dtype: torch.dtype  # as stored: int64 for choices alone

    @property
    def num_logits(self) -> int:
        """How many numbers an action mask has: the logits of all choices."""
        return sum(choices(self.distribution, self.size))

    @property
    def is_structure(self) -> bool:
        """Whether an action is a dict or a tuple."""
        return isinstance(self.space, Dict | Tuple)

    def to_env(self, action: Tensor) -> Any:
        """Stored actions (N, *shape) -> actions for the environments, a tensor or a structure of tensors (N, ...).

        See `ActionLeaf.to_env`.
        """
        if not self.is_structure:
            return self.leaves[0].to_env(action)
        return _nested(self.space, (leaf.to_env(part) for leaf, part in self._parts(action)))

    def to_env_array(self, action: Tensor) -> Any:
        """`to_env` for environments of arrays. See `ActionLeaf.to_env_array`."""
        if not self.is_structure:
            return self.leaves[0].to_env_array(action)
        return _nested(self.space, (leaf.to_env_array(part) for leaf, part in self._parts(action)))

    def _parts(self, action: Tensor) -> Iterator[tuple[ActionLeaf, Tensor]]:
        """Each leaf and its stored numbers."""
        for leaf in self.leaves:
            part = action[..., leaf.first : leaf.first + leaf.width]
            part = part.squeeze(-1) if isinstance(leaf.space, Discrete) else part
            yield leaf, part.long() if leaf.numbers else part  # beside components, choices are stored as floats

    def to(self, device: torch.device) -> "ActionSpec":
        """The same with its bounds on `device`."""
        moved = (replace(leaf, low=leaf.low.to(device), high=leaf.high.to(device)) for leaf in self.leaves)
        return replace(self, leaves=tuple(moved))

    def noise_shape(self, *batch: int) -> tuple[int, ...]:
        """Shape of the noise that samples a batch of actions."""
        continuous = continuous_of(self.distribution)
        each = 0 if continuous is None else continuous.num_noise
        return (*batch, self.num_logits + num_components(self.distribution, self.size) * each)


def _nested(space: gym.Space[Any], leaves: Iterator[Any]) -> Any:
    """The leaves, in the order of the space, in its structure."""
    if isinstance(space, Dict):
        return {name: _nested(part, leaves) for name, part in space.spaces.items()}
    if isinstance(space, Tuple):
        return tuple(_nested(part, leaves) for part in space.spaces)
    return next(leaves)


def action_spec(space: gym.Space[Any], squash: bool, distribution: str = "normal") -> ActionSpec:
    """The `ActionSpec` of a space. distribution: of Box actions, a key of CONTINUOUS.

    Raises UsageError for a space that is not supported.
    """
    continuous = CONTINUOUS[distribution]
    asked = "--squash-actions" if squash else f"--action-distribution {distribution}"
    to_bounds: Any = "linear" if continuous is BETA else "tanh" if squash else "clip"
    leaves = list(_action_leaves(space, "action", (), to_bounds, asked))
    _check_structure("action", leaves)
    numbers = tuple(number for leaf in leaves for number in leaf.numbers)
    components = sum(leaf.width for leaf in leaves if not leaf.numbers)
    if (squash or distribution != "normal") and not components:
        raise UsageError(f"{asked} is for Box action spaces; this environment's is {type(space).__name__}: leave it off")
    next_choice, next_component = 0, len(numbers)
    for index, leaf in enumerate(leaves):
        leaves[index] = replace(leaf, first=next_choice if leaf.numbers else next_component)
        next_choice, next_component = next_choice + len(leaf.numbers), next_component + (0 if leaf.numbers else leaf.width)
    family: Family = continuous
    if isinstance(space, Discrete):
        family = CATEGORICAL
    elif numbers:
        family = Hybrid(numbers, components, continuous) if components else MultiCategorical(numbers)
    shape = () if isinstance(space, Discrete) else (len(numbers) + components,)
    dtype = torch.float32 if components else torch.int64
    return ActionSpec(space, tuple(leaves), family, sum(numbers) + components * continuous.num_outputs, shape, dtype)


def _action_leaves(
    space: gym.Space[Any], key: str, path: tuple[str | int, ...], to_bounds: Any, asked: str
) -> Iterator[ActionLeaf]:
    """The leaves of an action space, in its order. asked: the flag that wants finite bounds."""
    where, none = _where(path), torch.empty(0, dtype=torch.float32, device="cpu")
    if isinstance(space, Dict | Tuple):
        parts: Any = list(space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces))
        if not parts:
            raise UsageError(f"--env-id: action space {space}{where} is empty, which leaves nothing to choose")
        for name, part in parts:
            yield from _action_leaves(part, f"{key}.{name}", (*path, name), to_bounds, asked)
    elif isinstance(space, Box | MultiDiscrete | MultiBinary) and not math.prod(space.shape):
        raise UsageError(f"--env-id: action space {space}{where} is of shape {space.shape}, which leaves nothing to choose")
    elif isinstance(space, Discrete):
        yield ActionLeaf(key, path, space, (int(space.n),), _torch_dtype(space), none, none)
    elif isinstance(space, MultiDiscrete):
        numbers, start = tuple(space.nvec.flatten().tolist()), torch.from_numpy(space.start.flatten().astype(np.int64))
        yield ActionLeaf(key, path, space, numbers, _torch_dtype(space), start, none)
    elif isinstance(space, MultiBinary):
        start = torch.zeros(math.prod(space.shape), dtype=torch.int64, device="cpu")
        yield ActionLeaf(key, path, space, (2,) * len(start), _torch_dtype(space), start, none)
    elif isinstance(space, Box) and space.dtype in (np.float16, np.float32, np.float64):
        low, high = torch.from_numpy(space.low).flatten(), torch.from_numpy(space.high).flatten()
        if to_bounds != "clip" and not ((low.abs() < NO_BOUND).all() and (high.abs() < NO_BOUND).all()):
            raise UsageError(f"{asked} needs finite action bounds; this environment has none{where}: leave it off")
        yield ActionLeaf(key, path, space, (), low.dtype, low, high, to_bounds)
    elif isinstance(space, OneOf):
        raise UsageError(
            f"--env-id: action space {space}{where} is not supported; use a Tuple of a Discrete, which says which part counts, "
            "and of all the parts, and let the environment ignore the others"
        )
    else:
        raise UsageError(
            f"--env-id: action space {space}{where} is not supported; supported: Discrete, MultiDiscrete, MultiBinary, Box of "
            "float16, float32 or float64, and Dict and Tuple of these"
        )


def _check_structure(what: str, leaves: Sequence[ObsLeaf | ActionLeaf]) -> None:
    """Raise UsageError if two leaves have one key, or a checkpoint cannot hold the structure."""
    keys = [leaf.key for leaf in leaves]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UsageError(f"--env-id: two parts of the {what} are called {twice}: a dot in a name is one too many")
    if any(len(leaf.path) >= MAX_NESTING for leaf in leaves):
        raise UsageError(f"--env-id: the {what} space is nested {MAX_NESTING} deep or deeper; make it flatter")


def _where(path: tuple[str | int, ...]) -> str:
    """The place of a part in its space, for messages."""
    return f" (at {'.'.join(map(str, path))})" if path else ""


def _torch_dtype(space: gym.Space[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype
