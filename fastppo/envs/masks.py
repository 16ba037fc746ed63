"""Action masks from a method `action_masks()`, as in sb3-contrib, instead of from the info.

`action_masks` is a method, property or attribute of the environment or of a wrapper (the outermost one counts): (A,), all
choices of its action in a row. A vector environment may have its own: (N, A). It is not used for an environment whose
observation has an `action_mask`. One environment may also give its mask in parts (`flat_mask`). Does not import torch.
"""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AsyncVectorEnv, VectorEnv, VectorWrapper
from numpy.typing import NDArray

NAME = "action_masks"
# (N,) environments that need no mask -> (N, A), or a list of a mask or None for each environment
MaskSource = Callable[[NDArray[np.bool_]], Any]


def has_mask(space: gym.Space[Any]) -> bool:
    """Whether an observation of this space contains the mask."""
    return isinstance(space, Dict) and "action_mask" in space.spaces


def owner_of(env: Any) -> Any | None:
    """The environment or wrapper that has `action_masks`; None: there is none, or the observation contains the mask."""
    if has_mask(getattr(env, "observation_space", None) or gym.Space()):
        return None
    while env is not None and not _has(env):
        env = getattr(env, "env", None)
    return env


def masks_of(owner: Any) -> Any:
    """The present mask of the environment or wrapper that `owner_of` returned."""
    found = getattr(owner, NAME)
    return found() if callable(found) else found


def source_of(envs: VectorEnv) -> MaskSource | None:
    """A function that returns a vector environment's masks after a reset or step; None: it has none. Call it after a reset."""
    if has_mask(envs.single_observation_space):
        return None
    while isinstance(envs, VectorWrapper) and not _has(envs):
        envs = envs.env
    if _has(envs):
        whole = envs
        return lambda unneeded: masks_of(whole)
    if isinstance(envs, AsyncVectorEnv):
        workers = envs
        return (lambda unneeded: workers.call(NAME)) if all(workers.call("has_wrapper_attr", NAME)) else None
    parts = list(getattr(envs, "envs", ()))
    if parts and all(isinstance(part, VectorEnv) for part in parts):
        sources = [source_of(part) for part in parts]
        if any(source is None for source in sources):
            return None
        return lambda unneeded: [
            mask
            for source, rows in zip(sources, np.split(unneeded, len(parts)), strict=True)
            for mask in source(rows)  # type: ignore[misc]
        ]
    owners = [owner_of(part) for part in parts if isinstance(part, gym.Env)]
    if len(owners) != envs.num_envs or all(owner is None for owner in owners):
        return None
    return lambda unneeded: [
        None if skipped or owner is None else masks_of(owner) for skipped, owner in zip(unneeded, owners, strict=True)
    ]


def choices_of(space: gym.Space[Any]) -> list[int]:
    """The number of values of each choice of an action, in the order of its space. A Box has none."""
    numbers: list[int] = []
    for leaf in leaf_spaces(space):
        if isinstance(leaf, MultiBinary):
            numbers += [2] * int(np.prod(leaf.shape))
        elif isinstance(leaf, Discrete | MultiDiscrete):
            numbers += [int(number) for number in np.ravel(leaf.n if isinstance(leaf, Discrete) else leaf.nvec)]
    return numbers


def leaf_spaces(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    """The parts of a Dict or Tuple that are neither, in its order; else the space itself."""
    if isinstance(space, Dict | Tuple):
        parts = space.spaces.values() if isinstance(space, Dict) else space.spaces
        return [leaf for part in parts for leaf in leaf_spaces(part)]
    return [space]


def flat_mask(mask: Any, space: gym.Space[Any]) -> NDArray[Any]:
    """The mask (A,) of one environment: all choices in a row, in the order of the action space.

    mask: such an array; for MultiDiscrete and MultiBinary also a nested tuple of an array for each choice; for Dict and Tuple
    also a dict or tuple of the masks of their parts. There, a part that is missing or None, such as a Box, allows everything.

    Raises ValueError for a part of another size or of no name in the space.
    """
    if isinstance(space, Dict) and isinstance(mask, Mapping):
        _refuse_unknown(mask, space.spaces)
        pairs = [(mask.get(name), part) for name, part in space.spaces.items()]
    elif isinstance(space, Tuple) and isinstance(mask, tuple | list) and not all(isinstance(one, Real) for one in mask):
        pairs = list(zip(mask, space.spaces, strict=True))
    else:
        return _flat(mask)
    flat = [np.ones(sum(choices_of(part)), bool) if one is None else flat_mask(one, part) for one, part in pairs]
    for one, (_, part) in zip(flat, pairs, strict=True):
        if len(one) != sum(choices_of(part)):
            raise ValueError(f"an action_mask of {len(one)} numbers for {part}, which has {sum(choices_of(part))} choices")
    return np.concatenate(flat)


def _flat(mask: Any) -> NDArray[Any]:
    """The arrays of a nested tuple, flat and joined."""
    return np.concatenate([_flat(part) for part in mask]) if isinstance(mask, tuple | list) else np.ravel(mask)


def mask_of(batch: Any, space: gym.Space[Any], index: int) -> Any:
    """The mask of one environment from a batch (N, ...), or from a dict of batches as gymnasium joins dicts in infos."""
    if not (isinstance(space, Dict) and isinstance(batch, Mapping)):
        return batch[index]
    _refuse_unknown(batch, {**space.spaces, **{f"_{name}": None for name in space.spaces}})
    there = {name: part for name, part in space.spaces.items() if name in batch and _is_given(batch, name, index)}
    return {name: mask_of(batch[name], part, index) for name, part in there.items()}


def _is_given(batch: Mapping[str, Any], name: str, index: int) -> bool:
    return bool(batch[f"_{name}"][index]) if f"_{name}" in batch else True


def _refuse_unknown(mask: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = next((name for name in mask if name not in known), None)
    if unknown is not None:
        raise ValueError(f"an action_mask has {unknown!r}, and the action space has no such part")


def _has(env: Any) -> bool:
    """Whether it has `action_masks`. Does not evaluate a property, which may have no value before a reset."""
    return hasattr(type(env), NAME) or NAME in getattr(env, "__dict__", {})
