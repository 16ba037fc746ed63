"""Packages of JAX environments: how each makes, resets and steps one, and what its spaces are.

`PACKAGES` is the table, by the name in `--env-id jax:PACKAGE/NAME`. Each entry makes a `JaxEnv` (envs/jax.py) from a name and
--env-kwargs, and says which ends are truncations as far as its package does. A package is imported when an environment of it is
made. Knows nothing of batches, seeds or tensors.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from numpy.typing import NDArray

from fastppo.core.action_masks import choices_of
from fastppo.envs.jax import JaxEnv, JaxVectorEnv, Key, State
from fastppo.errors import UsageError, nearest

LIMITS = ("max_steps_in_episode", "max_timesteps")  # names of the time limit in parameters like gymnax's
NO_LIMIT = 2**31 - 1
CRAFTAX = tuple(f"Craftax-{kind}-v1" for kind in ("Symbolic", "Pixels", "Classic-Symbolic", "Classic-Pixels"))
BOUNDS = (("low", "minimum"), ("high", "maximum"))  # names of a space's bounds
GROUP = "state"  # of observations in groups, the policy's

Kwargs = dict[str, Any]


def make_jax_envs(
    package: str, name: str, num_envs: int, device: str | None = None, render_mode: str | None = None, **kwargs: Any
) -> JaxVectorEnv:
    """N environments of a package in `PACKAGES`; kwargs: --env-kwargs. Raises UsageError."""
    return JaxVectorEnv(PACKAGES[package](name, kwargs), num_envs, device, render_mode)


# --- gymnax, and Craftax, which has its interface


def of_gymnax(env: Any, params: Any) -> JaxEnv:
    """An environment with gymnax's interface. An end that comes only from the time limit in `params` is a truncation.

    Since gymnax 1.0 `step_env` returns terminations alone, and `is_truncated` knows the time limit.
    """
    unlimited, limit = _unlimited(params), getattr(env, "is_truncated", None)

    def step(key: Key, state: State, action: Any) -> tuple[State, Any, Any, Any, Any]:
        obs, after, reward, done, _ = env.step_env(key, state, action, params)
        # XLA computes what both steps have in common once
        terminated = done if unlimited is None else env.step_env(key, state, action, unlimited)[3]
        return after, obs, reward, terminated, done if limit is None else done | limit(after, params)

    return _gymnax_env(env, params, step)


def _gymnax_env(env: Any, params: Any, step: Callable[..., Any], render: Callable[[State], Any] | None = None) -> JaxEnv:
    def reset(key: Key) -> tuple[State, Any]:
        obs, state = env.reset_env(key, params)
        return state, obs

    spaces = space_of(env.observation_space(params)), space_of(env.action_space(params))
    return JaxEnv(*spaces, reset, step, render=render)


def _unlimited(params: Any) -> Any:
    """Parameters without their time limit; None: they have none."""
    name = next((name for name in LIMITS if hasattr(params, name)), None)
    return None if name is None else dataclasses.replace(params, **{name: NO_LIMIT})


def _with_params(params: Any, kwargs: Kwargs) -> tuple[Any, Kwargs]:
    """Parameters with those of `kwargs` that are among them, and the others."""
    names = {field.name for field in dataclasses.fields(params)} & set(kwargs)
    others = {name: value for name, value in kwargs.items() if name not in names}
    return dataclasses.replace(params, **{name: kwargs[name] for name in names}), others


def _gymnax(name: str, kwargs: Kwargs) -> JaxEnv:
    import gymnax
    from gymnax.registration import registered_envs

    _refuse_unknown("gymnax", name, registered_envs)
    _, own = _with_params(gymnax.make(name)[1], kwargs)
    env, params = gymnax.make(name, **own)
    params, _ = _with_params(params, kwargs)
    made = of_gymnax(env, params)
    return made._replace(render=_classic_control(name, params)) if name in gym.registry else made


def _classic_control(name: str, params: Any) -> Callable[[State], NDArray[np.uint8]]:
    """Draws a state of gymnax's classic control by gymnasium's environment of the same name."""
    from gymnax.visualize.vis_gym import get_gym_state

    made: list[Any] = []

    def render(state: State) -> NDArray[np.uint8]:
        if not made:
            made.append(gym.make(name, render_mode="rgb_array", disable_env_checker=True))
            made[0].reset()
        drawn = made[0].unwrapped
        drawn.state = get_gym_state(state, name)
        if hasattr(state, "last_u"):
            drawn.last_u = float(state.last_u)
        return drawn.render()

    return render


def _craftax(name: str, kwargs: Kwargs) -> JaxEnv:
    from craftax.craftax_env import make_craftax_env_from_name

    _refuse_unknown("craftax", name, CRAFTAX)
    env = make_craftax_env_from_name(name, auto_reset=False)
    params, unknown = _with_params(env.default_params, kwargs)
    _refuse_arguments(unknown)
    unlimited = _unlimited(params)

    def step(key: Key, state: State, action: Any) -> tuple[State, Any, Any, Any, Any]:
        obs, after, reward, done, _ = env.step_env(key, state, action, params)
        return after, obs, reward, env.is_terminal(after, unlimited), done

    return _gymnax_env(env, params, step)


# --- Brax


def of_brax(env: Any, episode_length: int | None, render: Callable[[State], Any] | None = None, fps: int = 30) -> JaxEnv:
    """An environment with Brax's interface. Of observations in groups the policy gets "state"."""

    def chosen(obs: Any) -> Any:
        return obs[GROUP] if isinstance(obs, Mapping) and GROUP in obs else obs

    def reset(key: Key) -> tuple[State, Any]:
        state = env.reset(key)
        return state, chosen(state.obs)

    def step(key: Key, state: State, action: Any) -> tuple[State, Any, Any, Any, Any]:
        state = env.step(state, action)
        return state, chosen(state.obs), state.reward, state.done != 0, jnp.zeros((), bool)

    obs = jax.eval_shape(reset, jax.random.PRNGKey(0))[1]
    actions = Box(-1.0, 1.0, (env.action_size,))
    return JaxEnv(_unbounded(obs), actions, reset, step, episode_length, render, fps)


def _unbounded(obs: Any) -> gym.Space[Any]:
    """The space of an observation of floats, or of a dict of these."""
    if isinstance(obs, Mapping):
        return Dict({name: _unbounded(part) for name, part in obs.items()})
    return Box(-np.inf, np.inf, obs.shape)


def _brax(name: str, kwargs: Kwargs) -> JaxEnv:
    from brax import envs
    from brax.io import image

    _refuse_unknown("brax", name, envs._envs)
    length = kwargs.pop("episode_length", 1000)  # as in brax.envs.create
    env = envs.get_environment(name, **kwargs)

    def render(state: State) -> NDArray[np.uint8]:
        return image.render_array(env.sys, state.pipeline_state)

    return of_brax(env, length, render, round(1 / float(env.dt)))


# --- Navix


def _navix(name: str, kwargs: Kwargs) -> JaxEnv:
    import navix
    from navix.environments.environment import StepType

    _refuse_unknown("navix", name, navix.registry())
    env = navix.make(name, **kwargs)

    def reset(key: Key) -> tuple[State, Any]:
        timestep = env.reset(key)
        return timestep, timestep.observation

    def step(key: Key, timestep: State, action: Any) -> tuple[State, Any, Any, Any, Any]:
        timestep = env._step(timestep, action)  # `step` is this and a reset
        is_end = (timestep.step_type == kind for kind in (StepType.TERMINATION, StepType.TRUNCATION))
        return timestep, timestep.observation, timestep.reward, *is_end

    picture = jax.jit(navix.observations.rgb)
    spaces = space_of(env.observation_space), space_of(env.action_space)
    return JaxEnv(*spaces, reset, step, render=lambda timestep: picture(timestep.state), render_fps=10)


# --- Jumanji


def _jumanji(name: str, kwargs: Kwargs) -> JaxEnv:
    import jumanji

    _refuse_unknown("jumanji", name, jumanji.registered_environments())
    env = jumanji.make(name, **kwargs)

    def step(key: Key, state: State, action: Any) -> tuple[State, Any, Any, Any, Any]:
        state, timestep = env.step(state, action)
        terminated = timestep.last() & (timestep.discount == 0)
        return state, observed(timestep.observation), timestep.reward, terminated, timestep.last()

    def reset(key: Key) -> tuple[State, Any]:
        state, timestep = env.reset(key)
        return state, observed(timestep.observation)

    def observed(obs: Any) -> Any:
        return {renamed.get(part, part): getattr(obs, part) for part in parts} if parts else obs

    space, actions = space_of(env.observation_spec), space_of(env.action_spec)
    parts = list(space.spaces) if isinstance(space, Dict) else []
    renamed = {}
    mask = space.spaces.get("action_mask") if isinstance(space, Dict) else None
    if isinstance(space, Dict) and mask is not None and np.prod(mask.shape or ()) != sum(choices_of(actions)):
        renamed["action_mask"] = "legal"  # of pairs of choices, where a mask is of each choice alone: an observation
        space = Dict({renamed.get(part, part): own for part, own in space.spaces.items()})
    return JaxEnv(space, actions, reset, step)


# --- spaces


def space_of(space: Any) -> gym.Space[Any]:
    """A space of gymnax, Craftax or Navix, or a spec of Jumanji, as gymnasium's. Raises UsageError."""
    parts = getattr(space, "spaces", None) or getattr(space, "_specs", None)
    if parts and isinstance(parts, Mapping):
        return Dict({name: space_of(part) for name, part in parts.items()})
    number = next((getattr(space, name) for name in ("num_values", "n") if hasattr(space, name)), None)
    shape, dtype = tuple(getattr(space, "shape", None) or ()), np.dtype(getattr(space, "dtype", np.float32))
    if number is not None and np.ndim(number) > 0:
        return MultiDiscrete(np.asarray(number))
    if number is not None and not shape:
        return Discrete(int(number))
    low, high = (next((getattr(space, name) for name in names if hasattr(space, name)), None) for names in BOUNDS)
    if not hasattr(space, "shape") or (low is None) != (high is None):
        raise UsageError(f"its space {space} is not supported; supported: boxes, discrete spaces, and dicts of these")
    return _box(low, high, shape, dtype)


def _box(low: Any, high: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Box:
    """A Box. Bounds of None are those of the type. Bytes go from 0 to 255, whatever the package says, and bools are 0 or 1."""
    if dtype.kind == "b":
        return Box(0, 1, shape, np.int8)
    if dtype == np.uint8:
        return Box(0, 255, shape, np.uint8)
    if low is None:
        low, high = (-np.inf, np.inf) if dtype.kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    dtype = np.dtype(np.float32) if dtype.kind == "f" else dtype
    low, high = (np.broadcast_to(np.asarray(bound), shape).astype(dtype) for bound in (low, high))
    return Box(low, high, shape, dtype.type)


# --- mistakes


def _refuse_unknown(package: str, name: str, known: Iterable[str]) -> None:
    """Raise UsageError for a name that the package does not have; names the nearest."""
    known = list(known)
    if name not in known:
        raise UsageError(f"{package} has no {name!r}{nearest(name, known)}")


def _refuse_arguments(unknown: Kwargs) -> None:
    for name in unknown:
        raise TypeError(f"unexpected argument {name!r}")


PACKAGES: Mapping[str, Callable[[str, Kwargs], JaxEnv]] = MappingProxyType(
    {
        "gymnax": _gymnax,
        "brax": _brax,
        "navix": _navix,
        "craftax": _craftax,
        "jumanji": _jumanji,
    }
)
