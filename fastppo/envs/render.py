"""One environment for videos and windows, and the images that it renders. Knows nothing of videos or windows themselves."""

import contextlib
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from fastppo.envs.agents import with_agent_rows
from fastppo.envs.atari import make_rgb_ale
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.factory import EnvConfig, is_on_device, make_device_envs, make_gymnasium_envs
from fastppo.envs.registry import find_spec, is_atari
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located

Frame = NDArray[np.uint8]  # (H, W, 3)


def make_render_env(config: EnvConfig, deadline: Deadline = NO_DEADLINE) -> AutoresetEnvs:
    """One environment with the render mode "rgb_array". It has been reset and rendered once.

    Until it is closed, environment variables keep it from asking for a display where there is none.

    Args:
        deadline: for each call of the environment.

    Raises:
        UsageError: it cannot be made, or cannot be rendered; says why, and which render modes it has.
    """
    with contextlib.ExitStack() as variables:
        variables.enter_context(_without_a_display())
        envs = AutoresetEnvs(make_rgb_env(config), deadline)
        try:
            envs.reset(None)
            render_frame(envs)
        except ENVIRONMENT_ERRORS as error:
            envs.close()
            reason = str(error) if isinstance(error, UsageError) else located(error)
            raise UsageError(f"--env-id {config.env_id} cannot be rendered: {reason}") from None
        envs.closing.push(variables.pop_all())
    return envs


def make_rgb_env(config: EnvConfig) -> VectorEnv:
    """One environment of the run's kind whose `render` returns an image, from another engine where its own renders nothing.

    Raises:
        UsageError: no engine renders it; says which render modes it has.
    """
    kwargs = {name: value for name, value in config.env_kwargs.items() if name != "render_mode"}
    config = replace(config, num_envs=1, env_kwargs=kwargs, autoreset="next-step")  # it shows an episode's last state
    if config.backend == "torch":
        return make_device_envs(config, "cpu", "rgb_array")
    if is_atari(config.env_id):
        return make_rgb_ale(config.env_id, kwargs, config.atari)
    if config.backend == "envpool":
        raise UsageError(f"--env-id {config.env_id} cannot be rendered: EnvPool has no render modes")
    config = replace(config, vectorization="entry-point" if find_spec(config.env_id).entry_point is None else "sync")
    rendered = replace(config, env_kwargs={**kwargs, "render_mode": "rgb_array"})
    if "rgb_array" in declared_modes(find_spec(config.env_id)):
        return with_agent_rows(make_gymnasium_envs(rendered))
    envs = make_gymnasium_envs(config)
    modes = envs.metadata.get("render_modes") or ()
    envs.close()
    if is_on_device(envs.unwrapped):
        return make_device_envs(config, "cpu", "rgb_array")
    if "rgb_array" not in modes:
        has = ", ".join(map(str, modes)) or "none"
        raise UsageError(
            f"--env-id {config.env_id} cannot be rendered: it has no render mode rgb_array; its render modes: {has}"
        )
    return with_agent_rows(make_gymnasium_envs(rendered))


def declared_modes(spec: gym.envs.registration.EnvSpec) -> Collection[str]:
    """The render modes that an environment's class declares; () where only an environment tells."""
    maker: Any = spec.entry_point
    if isinstance(maker, str):
        with contextlib.suppress(*ENVIRONMENT_ERRORS):  # met again when it is made
            maker = gym.envs.registration.load_env_creator(maker)
    metadata = getattr(maker, "metadata", None)
    return (metadata.get("render_modes") or ()) if isinstance(metadata, dict) else ()


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


def shows_windows() -> bool:
    """Whether a window that is opened here is seen: not with SDL's dummy driver, which rendering takes without a display."""
    return has_display() and os.environ.get("SDL_VIDEODRIVER") != "dummy"


@contextlib.contextmanager
def _without_a_display() -> Iterator[None]:
    """Keep pygame from asking for sound, and pygame and MuJoCo from asking for a display where there is none."""
    names = {"SDL_AUDIODRIVER": "dummy"}
    if not has_display():
        names |= {"SDL_VIDEODRIVER": "dummy", "MUJOCO_GL": "egl"}
    added = names.keys() - os.environ.keys()
    os.environ.update({name: names[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
