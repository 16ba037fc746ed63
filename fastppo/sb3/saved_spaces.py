"""The spaces of a Stable-Baselines3 model, from the readable text beside their pickles. Knows nothing of networks.

numpy prints eight digits of a number, so bounds may differ in their last digits from those of the environment.
"""

import re
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray

from fastppo.core.space_rules import is_image_shape
from fastppo.policy.codec import MAX_NUMBERS

KINDS = ("Box", "Discrete", "MultiDiscrete", "MultiBinary")
DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64)))


def read_space(data: Any) -> gym.Space[Any]:
    """The space that an entry of the JSON describes. Raises ValueError, KeyError or TypeError if it does not say enough."""
    found = re.fullmatch(r"<class 'gym(?:nasium)?\.spaces\.[a-z_]+\.(\w+)'>", str(data[":type:"]))
    kind = found[1] if found else "unknown"
    if kind not in KINDS:
        raise ValueError(f"a space of kind {kind[:50]} is not supported; supported: {', '.join(KINDS)}")
    if kind == "Discrete":
        n, start = int(data["n"]), int(data.get("start", 0))
        if not 1 <= n <= MAX_NUMBERS or start:
            raise ValueError(f"a Discrete of {n} values from {start} on")
        return Discrete(n)
    shape = _shape(data)
    if kind == "MultiBinary":
        return MultiBinary(shape)
    if kind == "MultiDiscrete":
        nvec = _numbers(data["nvec"], shape, np.int64)
        if _numbers(data.get("start", "[0]"), None, np.int64).any() or nvec.min() < 1 or nvec.sum() > MAX_NUMBERS:
            raise ValueError("a MultiDiscrete that does not count from 0, or is too large")
        return MultiDiscrete(nvec)
    dtype = str(data["dtype"])
    if dtype not in DTYPES:
        raise ValueError("a Box of an unknown dtype")
    if dtype == "uint8" and is_image_shape(shape):  # numpy prints the bounds of large arrays in part
        return Box(0, 255, shape, np.uint8)
    low, high = (_numbers(data[name], shape, dtype) for name in ("low", "high"))
    return Box(low, high, dtype=np.dtype(dtype).type)


def _shape(data: Mapping[str, Any]) -> tuple[int, ...]:
    shape = data.get("_shape", data.get("shape"))
    if shape is None:
        shape = data["n"] if isinstance(data["n"], list) else [data["n"]]  # a MultiBinary of older versions
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError("a space without a readable shape")
    if np.prod([float(size) for size in shape]) > MAX_NUMBERS:
        raise ValueError(f"a space of more than {MAX_NUMBERS} numbers")
    return tuple(shape)


def _numbers(text: Any, shape: tuple[int, ...] | None, dtype: Any) -> NDArray[Any]:
    """The numbers that numpy has printed. Raises ValueError if not all were printed and they are not all the same."""
    words = re.sub(r"[\[\],]", " ", str(text)).split()
    numbers = np.array([float(word) for word in words if word != "..."])
    if shape is None:
        return numbers
    if "..." in words:
        if not numbers.size or (numbers != numbers[0]).any():
            raise ValueError("bounds that are printed in part only")
        numbers = np.full(shape, numbers[0])
    if numbers.size != np.prod(shape):
        raise ValueError(f"{numbers.size} bounds of a space of shape {shape}")
    return numbers.reshape(shape).astype(dtype)
