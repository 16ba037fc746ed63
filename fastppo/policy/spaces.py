"""Map an environment's observation and action spaces to tensors. Knows nothing of networks or learning.

An observation is one tensor or several: a Dict or Tuple is split into leaves. Each leaf has its own key in the rollout and is
stored as the environment returns it (images stay uint8). An action mask, if the environment has one, is one more leaf.
The rollout stores actions as sampled. Bounds are applied only on the way to the environment, so PPO compares log-probabilities
of the sampled actions.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor

from fastppo.errors import UsageError
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL, Distribution, MultiCategorical

ACTION_MASK = "action_mask"  # key of the legal actions, in a Dict observation, in an info and in the rollout
NO_BOUND = 1e38  # a bound this large means no bound: environments give the largest float32 or float64
MIN_IMAGE_SIDE = 36  # smaller images have no output after the three convolutions of the Nature CNN


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
    leaves = list(_leaves(space, "obs", ()))
    if info_mask_size is not None:
        leaves.append(ObsLeaf(ACTION_MASK, (), (info_mask_size,), torch.bool, "mask"))
    keys = [leaf.key for leaf in leaves if leaf.kind != "mask"]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UsageError(f"--env-id: two parts of the observation are called {twice}: a dot in a name is one too many")
    masks = [leaf for leaf in leaves if leaf.kind == "mask"]
    if len(masks) > 1:
        raise UsageError("--env-id: the environment tells its action_mask twice, in the observation and in the info")
    if len(masks) == len(leaves):
        raise UsageError(f"--env-id: observation space {space} has nothing to observe")
    for mask in masks:
        if action is not None and (action.distribution is DIAGONAL_NORMAL or mask.size != action.size):
            raise UsageError(
                f"--env-id: an action_mask of {mask.size} numbers does not fit the action space {action.space}"
                + ("" if action.distribution is DIAGONAL_NORMAL else f", which has {action.size} choices")
            )
    normalized = {leaf.key for leaf in leaves} if normalize is True else set(normalize or ())
    for number, leaf in enumerate(leaves):
        if leaf.key not in normalized and leaf.dtype is torch.float64:
            leaves[number] = replace(leaf, dtype=torch.float32)
        elif leaf.key in normalized and leaf.kind == "vector":
            leaves[number] = replace(leaf, scale=1.0)
    return ObsSpec(tuple(sorted(leaves, key=lambda leaf: leaf.key)))


def _leaves(space: gym.Space[Any], key: str, path: tuple[str | int, ...]) -> Iterator[ObsLeaf]:
    """The leaves of a space. An empty part, like Box(shape=(0,)), has none."""
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
                yield from _leaves(part, f"{key}.{name}", (*path, name))
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
        pixels = space.dtype == np.uint8 and bool((space.low == 0).all() and (space.high == 255).all())
        kind: Any = "image" if pixels and is_image_shape(space.shape) else "vector"
        yield ObsLeaf(key, path, space.shape, dtype, kind, 1.0 / 255.0 if pixels else 1.0)
    else:
        where = "" if not path else f" (at {'.'.join(map(str, path))})"
        raise UsageError(
            f"--env-id: observation space {space}{where} is not supported; supported: Box, Discrete, MultiDiscrete, "
            "MultiBinary, and Dict and Tuple of these"
        )


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """(C, H, W) or (H, W, C), C the smallest of the three, or (H, W); large enough for the Nature CNN."""
    if len(shape) == 3:
        channels = min(shape[0], shape[2])
        sides = shape[1:] if shape[0] == channels else shape[:2]
        return channels <= min(sides) and min(sides) >= MIN_IMAGE_SIDE
    return len(shape) == 2 and min(shape) >= MIN_IMAGE_SIDE


@dataclass(frozen=True)
class ActionSpec:
    """An action of one environment: its distribution, how it is stored, and how the environment gets it."""

    space: gym.Space[Any]
    distribution: Distribution | MultiCategorical
    size: int  # A: logits, or components
    shape: tuple[int, ...]  # as stored: (), (K,) components, or (A,)
    dtype: torch.dtype  # as stored
    env_dtype: torch.dtype
    low: Tensor  # (A,) of env_dtype, for Box; (K,), the first value of each component, for MultiDiscrete
    high: Tensor
    squash: bool

    def to_env(self, action: Tensor) -> Tensor:
        """Stored actions (N, *shape) -> actions for the environments: shifted, clipped or squashed to the space.

        Actions of a Box or MultiDiscrete must be on the device of the bounds: the CPU, or the one given to `to`.
        """
        if isinstance(self.space, Discrete):
            return (action + int(self.space.start) if self.space.start else action).to(self.env_dtype)
        if isinstance(self.distribution, MultiCategorical):
            action = action + self.low
        else:
            if self.squash:
                action = self.low + (action.tanh() + 1.0) * (0.5 * self.high - 0.5 * self.low)
            # in the environment's dtype: a bound rounded to float32 may lie outside the space
            action = torch.minimum(torch.maximum(action.to(self.env_dtype), self.low), self.high)
        return action.to(self.env_dtype).reshape(*action.shape[:-1], *(self.space.shape or ()))

    def to_env_array(self, action: Tensor) -> NDArray[Any]:
        """`to_env` for environments of arrays: a new array, from an action on the CPU. The same bits.

        Between two steps of an environment, with a cold cache, `to_env` of a Box takes 52 us and this 23.
        """
        stored = action.numpy()
        if isinstance(self.space, Discrete):
            return (stored + int(self.space.start)).astype(self.space.dtype, copy=False)
        if self.squash or isinstance(self.distribution, MultiCategorical):
            return self.to_env(action).numpy()  # a new array already
        low, high = self._bounds
        clipped = np.minimum(np.maximum(stored.astype(low.dtype), low), high)
        return clipped.reshape(*stored.shape[:-1], *(self.space.shape or ()))

    @cached_property
    def _bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.low.numpy(), self.high.numpy()

    def to(self, device: torch.device) -> "ActionSpec":
        """The same with its bounds on `device`."""
        return replace(self, low=self.low.to(device), high=self.high.to(device))

    def noise_shape(self, *batch: int) -> tuple[int, ...]:
        """Shape of the noise that samples a batch of actions."""
        return (*batch, self.size)


def action_spec(space: gym.Space[Any], squash: bool) -> ActionSpec:
    """The `ActionSpec` of a space. Raises UsageError for a space that is not supported."""
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    if isinstance(space, Box | MultiDiscrete | MultiBinary) and not math.prod(space.shape):
        raise UsageError(f"--env-id: action space {space} is of shape {space.shape}, which leaves nothing to choose")
    if squash and not isinstance(space, Box):
        raise UsageError(f"--squash-actions is for Box action spaces; this environment's is {type(space).__name__}")
    if isinstance(space, Discrete):
        return ActionSpec(space, CATEGORICAL, int(space.n), (), torch.int64, _torch_dtype(space), none, none, False)
    if isinstance(space, MultiDiscrete | MultiBinary):
        if isinstance(space, MultiDiscrete):
            numbers, start = tuple(space.nvec.flatten().tolist()), torch.from_numpy(space.start.flatten().astype(np.int64))
        else:
            numbers = (2,) * math.prod(space.shape)
            start = torch.zeros(len(numbers), dtype=torch.int64, device="cpu")
        family = MultiCategorical(numbers)
        return ActionSpec(space, family, sum(numbers), (len(numbers),), torch.int64, _torch_dtype(space), start, none, False)
    if isinstance(space, Box) and space.dtype in (np.float16, np.float32, np.float64):
        size = math.prod(space.shape)
        low, high = torch.from_numpy(space.low).flatten(), torch.from_numpy(space.high).flatten()
        if squash and not ((low.abs() < NO_BOUND).all() and (high.abs() < NO_BOUND).all()):
            raise UsageError("--squash-actions needs finite action bounds; this environment has none: leave it off")
        return ActionSpec(space, DIAGONAL_NORMAL, size, (size,), torch.float32, low.dtype, low, high, squash)
    raise UsageError(
        f"--env-id: action space {space} is not supported; supported: Discrete, MultiDiscrete, MultiBinary, Box of float16, "
        "float32 or float64"
    )


def _torch_dtype(space: gym.Space[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, space.dtype)).dtype
