"""The choices of an action space, and action masks that are given in parts: one array (A,) of all choices in a row.

Knows nothing of environments or policies. Does not import torch.
"""

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray


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
    return np.concatenate(list(_parts(mask, space))) if _has_parts(mask, space) else _flat(mask)


def _has_parts(mask: Any, space: gym.Space[Any]) -> bool:
    if isinstance(space, Dict):
        return isinstance(mask, Mapping)
    return isinstance(space, Tuple) and isinstance(mask, tuple | list) and not all(map(_is_number, mask))


def _parts(mask: Any, space: gym.Space[Any]) -> Iterator[NDArray[Any]]:
    """The masks of the parts of a space, in its order."""
    if _has_parts(mask, space) and isinstance(space, Dict):
        _refuse_unknown(mask, space.spaces)
        for name, part in space.spaces.items():
            yield from _parts(mask.get(name), part)
    elif _has_parts(mask, space) and isinstance(space, Tuple):
        if len(mask) != len(space.spaces):
            raise ValueError(f"an action_mask of {len(mask)} parts for {space}, which has {len(space.spaces)}")
        for one, part in zip(mask, space.spaces, strict=True):
            yield from _parts(one, part)
    else:
        size = sum(choices_of(space))
        flat = np.ones(size, bool) if mask is None else _flat(mask)
        if len(flat) != size:
            raise ValueError(f"an action_mask of {len(flat)} numbers for {space}, which has {size} choices")
        yield flat


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | np.bool_)


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
