"""What a vector environment of processes exchanges in a step: observations, actions, rewards and ends in shared memory."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple

from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.errors import UsageError


def step_group(group: NumberedVectorEnv, rows: Any) -> dict[str, Any]:
    """Step a group with the actions in its rows and write the results into its rows; returns the infos."""
    # copied, since an environment may keep its action, and the next actions overwrite this memory
    obs, reward, terminated, truncated, info = group.step(deepcopy(rows["action"]))
    copy_into(rows["obs"], obs)
    rows["reward"][:], rows["terminated"][:], rows["truncated"][:] = reward, terminated, truncated
    return info


def reset_group(
    group: NumberedVectorEnv, rows: Any, message: tuple[Sequence[int | None], dict[str, Any] | None]
) -> dict[str, Any]:
    """Reset a group with (seeds, options) and write the observations into its rows; returns the infos."""
    seeds, options = message
    obs, info = group.reset(seed=list(seeds[: group.num_envs]), options=options)
    copy_into(rows["obs"], obs)
    return info


def exchanged_space(obs: Space[Any], action: Space[Any]) -> Dict:
    """The arrays that one environment exchanges in a step, as a space; raises UsageError for a space that no array can hold."""
    pad = "; pad them to a Box with a gymnasium.ObservationWrapper"
    for name, space, hint in (("observations", obs, pad), ("actions", action, "")):
        if not _has_arrays(space):
            raise UsageError(
                f"--vectorization grouped and async share arrays between processes, and none holds {name} of {space}; "
                f"supported: Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these{hint}"
            )
    numbers = {"reward": Box(-np.inf, np.inf, (), np.float64)}
    flags = {name: Box(0, 1, (), np.bool_) for name in ("terminated", "truncated")}  # type: ignore[arg-type]
    return Dict({"obs": obs, "action": action, **numbers, **flags})


def allocated_space(space: Space[Any]) -> Space[Any]:
    """A space of the same size in memory without float16, for which gymnasium before 1.4 cannot allocate shared memory."""
    if isinstance(space, Dict):
        return Dict({name: allocated_space(part) for name, part in space.spaces.items()})
    if isinstance(space, Tuple):
        return Tuple([allocated_space(part) for part in space.spaces])
    return Box(0, 1, space.shape, np.uint16) if space.dtype == np.float16 else space


def _has_arrays(space: Space[Any]) -> bool:
    """Whether a batch of this space is an array, or a dict or tuple of arrays."""
    if isinstance(space, Dict | Tuple):
        return all(map(_has_arrays, space.values() if isinstance(space, Dict) else space))
    return isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete)


def rows_of(batch: Any, rows: slice) -> Any:
    """Views of some rows of a batch, which may be a dict or tuple of batches."""
    if isinstance(batch, Mapping):
        return {name: rows_of(part, rows) for name, part in batch.items()}
    return tuple(rows_of(part, rows) for part in batch) if isinstance(batch, tuple) else batch[rows]


def copy_into(target: Any, source: Any) -> None:
    """Write a batch into another of the same form."""
    if isinstance(target, Mapping):
        for name, part in target.items():
            copy_into(part, source[name])
    elif isinstance(target, tuple):
        for part, batch in zip(target, source, strict=True):
            copy_into(part, batch)
    else:
        np.copyto(target, source)
