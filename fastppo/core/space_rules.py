"""What a space means, where environments and policies must agree: pictures, missing bounds, a legal action.

Knows nothing of environments or policies. Does not import torch.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from numpy.typing import NDArray

NO_BOUND = 1e38  # a bound this large means no bound: environments give the largest float32 or float64
MIN_IMAGE_SIDE = 36  # smaller images have no output after the three convolutions of the Nature CNN


def is_image(space: gym.Space[Any]) -> bool:
    """Bytes from 0 to 255 of an image's shape."""
    return is_pixels(space) and is_image_shape(space.shape or ())


def is_pixels(space: gym.Space[Any]) -> bool:
    """Bytes from 0 to 255, of any shape."""
    return isinstance(space, Box) and space.dtype == np.uint8 and bool((space.low == 0).all() and (space.high == 255).all())


def is_image_shape(shape: tuple[int, ...]) -> bool:
    """(C, H, W) or (H, W, C), C the smallest of the three, or (H, W); large enough for the Nature CNN."""
    if len(shape) == 3:
        channels = min(shape[0], shape[2])
        sides = shape[1:] if shape[0] == channels else shape[:2]
        return channels <= min(sides) and min(sides) >= MIN_IMAGE_SIDE
    return len(shape) == 2 and min(shape) >= MIN_IMAGE_SIDE


def any_action(space: gym.Space[Any]) -> NDArray[Any]:
    """A legal action of a space without parts, always the same; of any dtype."""
    action: Any = np.zeros(space.shape or ())
    if isinstance(space, Discrete | MultiDiscrete):
        action = space.start
    elif isinstance(space, Box):
        action = np.clip(action, space.low, space.high)
    return np.asarray(action)
