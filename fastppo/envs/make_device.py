"""From an environment id to environments on the device, or to one clear line why not."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import torch

from fastppo.envs.classic import CLASSIC
from fastppo.envs.device import DeviceEnv, TorchVectorEnv
from fastppo.envs.make import find_spec, first_line, import_module_of, make_vec
from fastppo.errors import UsageError, brief, nearest


def make_device_vec(
    env_id: str, num_envs: int, env_kwargs: Mapping[str, Any], device: torch.device | str, render_mode: str | None = None
) -> TorchVectorEnv:
    """N environments on the device, as one.

    Args:
        env_id: of `CLASSIC`, or a registered id whose vector_entry_point builds a `TorchVectorEnv`; module:Id to import the
            module that registers it. Its entry point need not know of devices or render modes: its `env` is wrapped anew.
        env_kwargs: for the environment's constructor, `max_episode_steps` among them.
        render_mode: None or "rgb_array".

    Raises:
        UsageError: an id that has no such environment, or arguments that do not fit it; names the flag.
    """
    name = import_module_of(env_id)
    try:
        env = CLASSIC[name](**env_kwargs) if name in CLASSIC else _registered(env_id, name, num_envs, env_kwargs)
        envs = TorchVectorEnv(env, num_envs, device, render_mode)
    except TypeError as error:
        raise UsageError(f"--env-kwargs do not fit {env_id}: {first_line(error)}") from None
    except ValueError as error:
        raise UsageError(f"--env-id {env_id}: {first_line(error)}") from None
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"--env-id {env_id} cannot be made: {brief(error)}") from None
    envs.spec = find_spec(env_id)
    return envs


def _registered(env_id: str, name: str, num_envs: int, env_kwargs: Mapping[str, Any]) -> DeviceEnv:
    """The `DeviceEnv` that the vector entry point of a registered id wraps."""
    spec = gym.registry.get(name)
    if spec is not None and spec.vector_entry_point is not None:
        envs, _ = make_vec(env_id, num_envs, "entry-point", env_kwargs)
        envs.close()
        if isinstance(envs.unwrapped, TorchVectorEnv):
            return envs.unwrapped.env
    hint = "" if spec is not None else nearest(name, [key for key, value in gym.registry.items() if _may_be_ours(value)])
    raise UsageError(
        f"--backend torch has no {name}; it has: {', '.join(sorted(CLASSIC))} "
        f'(or register your own: docs/environments.md, "Your own environment on the device"){hint}'
    )


def _may_be_ours(spec: gym.envs.registration.EnvSpec) -> bool:
    """Registered with a vector environment that is not gymnasium's."""
    return spec.vector_entry_point is not None and not str(spec.vector_entry_point).startswith("gymnasium.")
