"""Which engine runs an environment: gymnasium's vector environments, ALE's, EnvPool's, or functions on tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.vector import VectorEnv, VectorWrapper

from fastppo.envs.atari import AtariSettings, is_atari, make_ale
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.envpool import make_envpool
from fastppo.envs.make import make_vec
from fastppo.envs.make_device import make_device_vec
from fastppo.errors import UsageError


def make_envs(
    env_id: str,
    num_envs: int,
    backend: str,
    vectorization: str,
    env_kwargs: Mapping[str, Any],
    device: torch.device | str,
    atari: AtariSettings,
    num_threads: int | None = None,
    deadline: Deadline = NO_DEADLINE,
) -> VectorEnv:
    """N environments as one.

    Args:
        backend: "torch", on the device; "envpool"; "gymnasium", stepped by calls from Python, whatever the class; "auto": the
            first where the id's own vector class is a `TorchVectorEnv`, else gymnasium.
        vectorization: as `make_vec` takes it; for gymnasium's only. ALE's games have but their own vector class.
        device: where a `TorchVectorEnv` lives.
        atari: for ALE's games, whoever runs them.
        num_threads, deadline: as `make_vec` takes them.

    Raises:
        UsageError: as `make_vec`, `make_ale`, `make_envpool` and `make_device_vec`.
    """
    if backend == "torch":
        return make_device_vec(env_id, num_envs, env_kwargs, device)
    if backend == "envpool":
        return make_envpool(env_id, num_envs, env_kwargs, atari)
    if is_atari(env_id):
        if vectorization not in ("auto", "entry-point"):
            raise UsageError(
                f"--vectorization {vectorization} is not for {env_id}: ALE steps all games in its own threads; leave it at auto"
            )
        return make_ale(env_id, num_envs, env_kwargs, atari)
    made, _ = make_vec(env_id, num_envs, vectorization, env_kwargs, num_threads, deadline)
    if not isinstance(made.unwrapped, TorchVectorEnv):
        return made
    if backend == "gymnasium":
        return VectorWrapper(made)  # no TorchVectorEnv any more, for those who look
    made.close()
    return TorchVectorEnv(made.unwrapped.env, num_envs, device)


def engine_name(made: VectorEnv, env_id: str, backend: str, vectorization: str) -> str:
    """ "torch", "envpool", "ale" or "gymnasium/VECTORIZATION", for logs: who runs what `make_envs` made of these arguments."""
    if isinstance(made, TorchVectorEnv):
        return "torch"
    if backend == "envpool":
        return "envpool"
    return "ale" if is_atari(env_id) else f"gymnasium/{vectorization}"
