"""One environment that can be looked at: a vector environment of one whose `render` returns what there is to see.

It is the environment that was trained on, by another engine where that one draws nothing. Knows nothing of videos or windows.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from fastppo.envs.atari import AtariSettings, is_atari, make_drawn_ale
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.make import find_spec, make_vec
from fastppo.envs.make_device import make_device_vec
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located

Frame = NDArray[np.uint8]  # (H, W, 3)


def make_drawn(
    env_id: str, backend: str, env_kwargs: Mapping[str, Any], atari: AtariSettings, deadline: Deadline = NO_DEADLINE
) -> AutoresetEnvs:
    """One environment with the render mode "rgb_array", tried: it has been reset and drawn once.

    Args:
        backend, atari, deadline: as `make_envs` takes them.

    Raises:
        UsageError: it cannot be made, or cannot be drawn; says why, and which render modes it has.
    """
    _draw_without_a_display()
    envs = AutoresetEnvs(_make(env_id, backend, env_kwargs, atari), deadline)
    try:
        envs.reset(None)
        draw(envs)
    except ENVIRONMENT_ERRORS as error:
        envs.close()
        reason = str(error) if isinstance(error, UsageError) else located(error)
        raise UsageError(f"--env-id {env_id} cannot be drawn: {reason}") from None
    return envs


def draw(envs: AutoresetEnvs) -> Frame:
    """What the first environment looks like; raises UsageError where that is no picture."""
    with envs.deadline:
        frames: Any = envs.envs.render()
    frame = frames[0] if isinstance(frames, tuple | list) and frames else frames
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{frame.dtype} {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise UsageError(f"its render() returns no uint8 array (H, W, 3), but {found}")
    return frame


def frames_per_second(envs: AutoresetEnvs) -> float:
    """At which it plays at its natural speed; 30 where it does not say."""
    fps = envs.envs.metadata.get("render_fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 30.0


def has_display() -> bool:
    """Whether there is something to open a window on, as far as the environment variables tell."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"))


def _draw_without_a_display() -> None:
    """Have pygame ask for no sound, and where there is no display have neither it nor MuJoCo look for one."""
    names = {"SDL_AUDIODRIVER": "dummy"}
    if not has_display():
        names |= {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"}
    for name, value in names.items():
        os.environ.setdefault(name, value)


def _make(env_id: str, backend: str, env_kwargs: Mapping[str, Any], atari: AtariSettings) -> VectorEnv:
    kwargs = {name: value for name, value in env_kwargs.items() if name != "render_mode"}
    if backend == "torch":
        return make_device_vec(env_id, 1, kwargs, "cpu", "rgb_array")
    if is_atari(env_id):
        return make_drawn_ale(env_id, kwargs, atari)
    if backend == "envpool":
        raise UsageError(f"--env-id {env_id} cannot be drawn: EnvPool has no render modes")
    vectorization = "entry-point" if find_spec(env_id).entry_point is None else "sync"
    made, _ = make_vec(env_id, 1, vectorization, kwargs)
    on_device, modes = isinstance(made.unwrapped, TorchVectorEnv), made.metadata.get("render_modes") or ()
    made.close()
    if on_device:
        return make_device_vec(env_id, 1, kwargs, "cpu", "rgb_array")
    if "rgb_array" not in modes:
        has = ", ".join(map(str, modes)) or "none"
        raise UsageError(f"--env-id {env_id} cannot be drawn: it has no render mode rgb_array; its render modes: {has}")
    return make_vec(env_id, 1, vectorization, {**kwargs, "render_mode": "rgb_array"})[0]
