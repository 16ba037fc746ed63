"""The arguments of `train`: which settings and which environments they mean. Knows nothing of how a run goes."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.config import TrainConfig
from fastppo.env_objects import giving
from fastppo.envs.functions import naming
from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.envs.simulators import as_vector_env
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located
from fastppo.find_preset import preset_for
from fastppo.given_settings import with_settings
from fastppo.system.paths import current_directory, path_of
from fastppo.training.resumed_settings import resumed_with

GivenEnvs = VectorEnv | gym.Env[Any, Any] | Sequence[gym.Env[Any, Any]] | Callable[..., Any]


@contextlib.contextmanager
def arguments(
    config: TrainConfig | str | None,
    envs: GivenEnvs | None,
    env_fn: Callable[..., Any] | None,
    settings: Mapping[str, Any],
) -> Iterator[tuple[TrainConfig, VectorEnv | None]]:
    """Context with the settings, and the environments that were given. In it the settings' env_id means `env_fn`, and their
    env_kwargs stand for the objects that were given.

    Raises UsageError for arguments of the wrong type, or that contradict each other.
    """
    env_kwargs = settings.get("env_kwargs")
    if isinstance(env_kwargs, Mapping) and all(isinstance(name, str) for name in env_kwargs):
        with giving(env_kwargs) as recorded, _checked(config, envs, env_fn, {**settings, "env_kwargs": recorded}) as found:
            yield found
    else:
        with _checked(config, envs, env_fn, settings) as found:
            yield found


@contextlib.contextmanager
def _checked(
    config: TrainConfig | str | None,
    envs: GivenEnvs | None,
    env_fn: Callable[..., Any] | None,
    settings: Mapping[str, Any],
) -> Iterator[tuple[TrainConfig, VectorEnv | None]]:
    """`arguments`, with env_kwargs as config.json has them."""
    if env_fn is not None and not callable(env_fn):
        raise UsageError(f"env_fn must be a function that makes an environment, got {env_fn!r:.99}; an id is given as env_id")
    if envs is not None and env_fn is not None:
        raise UsageError("envs and env_fn both say what to train on: give one of them")
    if callable(envs):
        envs, env_fn = None, envs
    if env_fn is None:
        given = None if envs is None else vector_of(envs)
        chosen = _settings(config, settings, given)
        if isinstance(given, NumberedVectorEnv):
            given.info_names = chosen.env_config.info_names
        yield chosen, given
        return
    start = config if isinstance(config, TrainConfig) else None
    in_config = None if start is None or start.env_id == TrainConfig.env_id else start.env_id
    named = config if isinstance(config, str) else settings.get("env_id", in_config)
    with naming(env_fn) as env_id:
        if named not in (None, env_id):
            raise UsageError(f"env_id {named} and env_fn both say what to train on: give one of them")
        yield _settings(start, {**settings, "env_id": env_id}, None), None


def _settings(config: Any, settings: Mapping[str, Any], given: VectorEnv | None) -> TrainConfig:
    """The settings of `config`, of a resumed run, of an env_id's preset or of the given environments; `settings` on top."""
    if isinstance(config, TrainConfig):
        return with_settings(config, settings)
    if not isinstance(config, str | None):
        raise UsageError(f"config must be a TrainConfig or an env_id, got a {type(config).__name__}; environments go to envs")
    if config is not None and settings.get("env_id", config) != config:
        raise UsageError(f"env_id {settings['env_id']} and {config} both say what to train on: give one of them")
    env_id = config or settings.get("env_id")
    if settings.get("resume") is not None:
        changed = {name: value for name, value in settings.items() if name != "resume"}
        changed |= {} if env_id is None else {"env_id": env_id}
        changed |= {} if given is None else {"num_envs": given.num_envs}
        return resumed_with(path_of(settings["resume"], "--resume"), current_directory(), changed)
    others = {name: value for name, value in settings.items() if name != "env_id"}
    if given is None:
        return preset_for(env_id, **others)
    spec = getattr(given, "spec", None)
    known = env_id or (type(given.unwrapped).__name__ if spec is None else spec.id)
    start = preset_for(known, **{name: others.pop(name) for name in ("preset",) if name in others})
    return with_settings(with_number(start, given.num_envs), others)


def with_number(config: TrainConfig, num_envs: int) -> TrainConfig:
    """`config` for another number of environments: a rollout has about as many rows, which the minibatches divide."""
    unit = config.minibatches_per_epoch // math.gcd(config.minibatches_per_epoch, num_envs)
    steps = max(round(config.batch_size / num_envs / unit), 1) * unit
    return replace(config, num_envs=num_envs, num_steps=steps)


def vector_of(envs: Any) -> VectorEnv:
    """What was given as a vector environment; one environment or a list of them is stepped in this process.

    Raises UsageError for anything else, and for environments that do not fit together.
    """
    envs = as_vector_env(envs)
    if isinstance(envs, VectorEnv):
        return envs
    each = [envs] if isinstance(envs, gym.Env) else envs
    if not isinstance(each, Sequence) or not each or not all(isinstance(env, gym.Env) for env in each):
        raise UsageError(
            "envs must be a gymnasium Env, a list of them, a VectorEnv, or a function that makes one, "
            f"got a {type(envs).__name__}" + (" with something else in it" if isinstance(each, Sequence) and each else "")
        )
    if len({id(env) for env in each}) < len(each):
        raise UsageError("envs holds one environment twice: make each by itself, [gym.make(...) for _ in range(8)]")
    try:
        made = NumberedVectorEnv([lambda env=env: env for env in each])  # type: ignore[misc]
    except ENVIRONMENT_ERRORS as error:
        raise UsageError(f"envs do not fit together: {located(error)}") from None
    made.spec = each[0].spec or EnvSpec(type(each[0].unwrapped).__name__)
    return made
