"""Action masks from a method `action_masks()`, as in sb3-contrib, instead of from the info.

`action_masks` is a method, property or attribute of the environment or of a wrapper (the outermost one counts): (A,), all
choices of its action in a row. A vector environment may have its own: (N, A). It is not used for an environment whose
observation has an `action_mask`. One environment may also give its mask in parts (action_masks.py). Does not import torch.
"""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict
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


def _has(env: Any) -> bool:
    """Whether it has `action_masks`. Does not evaluate a property, which may have no value before a reset."""
    return hasattr(type(env), NAME) or NAME in getattr(env, "__dict__", {})
