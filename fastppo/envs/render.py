"""One environment for videos and windows, and the images that it renders. Knows nothing of videos or windows themselves."""

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.factory import EnvConfig, make_rgb_env
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located

Frame = NDArray[np.uint8]  # (H, W, 3)


def make_render_env(config: EnvConfig, deadline: Deadline = NO_DEADLINE) -> AutoresetEnvs:
    """One environment with the render mode "rgb_array". It has been reset and rendered once.

    Args:
        deadline: for each call of the environment.

    Raises:
        UsageError: it cannot be made, or cannot be rendered; says why, and which render modes it has.
    """
    _render_without_a_display()
    envs = AutoresetEnvs(make_rgb_env(config), deadline)
    try:
        envs.reset(None)
        render_frame(envs)
    except ENVIRONMENT_ERRORS as error:
        envs.close()
        reason = str(error) if isinstance(error, UsageError) else located(error)
        raise UsageError(f"--env-id {config.env_id} cannot be rendered: {reason}") from None
    return envs


def render_frame(envs: AutoresetEnvs) -> Frame:
    """The image that the first environment renders; raises UsageError where that is no uint8 array (H, W, 3)."""
    with envs.deadline:
        frames: Any = envs.envs.render()
    frame = frames[0] if isinstance(frames, tuple | list) and frames else frames
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UsageError(f"its render() returns no uint8 array (H, W, 3), but {found}")
    return frame


def frames_per_second(envs: AutoresetEnvs) -> float:
    """Its metadata's render_fps; 30 where it has none."""
    fps = envs.envs.metadata.get("render_fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 30.0


def has_display() -> bool:
    """Whether a window can be opened, according to the environment variables."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def _render_without_a_display() -> None:
    """Keep pygame from asking for sound, and pygame and MuJoCo from asking for a display where there is none."""
    names = {"SDL_AUDIODRIVER": "dummy"}
    if not has_display():
        names |= {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"}
    for name, value in names.items():
        os.environ.setdefault(name, value)
