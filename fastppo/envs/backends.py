"""Which engine runs an environment: gymnasium's vector environments, or functions on tensors on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.make import make_vec
from fastppo.envs.make_device import make_device_vec


def make_envs(
    env_id: str, num_envs: int, backend: str, vectorization: str, env_kwargs: Mapping[str, Any], device: torch.device | str
) -> VectorEnv:
    """N environments as one.

    Args:
        backend: "torch", on the device; "gymnasium", stepped by calls from Python, whatever the class; "auto": the former where
            the id's own vector class is a `TorchVectorEnv`.
        vectorization: as `make_vec` takes it; for gymnasium's only.
        device: where a `TorchVectorEnv` lives.

    Raises:
        UsageError: as `make_vec` and `make_device_vec`.
    """
    if backend != "torch":
        made, _ = make_vec(env_id, num_envs, vectorization, env_kwargs)
        if not isinstance(made.unwrapped, TorchVectorEnv):
            return made
        if backend == "gymnasium":
            return VectorWrapper(made)  # no TorchVectorEnv any more, for those who look
        made.close()
        return TorchVectorEnv(made.unwrapped.env, num_envs, device)
    return make_device_vec(env_id, num_envs, env_kwargs, device)
