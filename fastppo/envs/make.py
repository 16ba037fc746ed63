"""From an environment id to a gymnasium vector environment, or to one clear line why not. Costs no torch."""

import importlib
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import VectorEnv

from fastppo.envs.cartpole import SeededCartPole
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.vector import GroupedVectorEnv, NumberedVectorEnv
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located, nearest
from fastppo.system.cpus import available_cores


def make_vec(
    env_id: str,
    num_envs: int,
    vectorization: str,
    env_kwargs: Mapping[str, Any],
    num_threads: int | None = None,
    deadline: Deadline = NO_DEADLINE,
    is_trial: bool = False,
) -> tuple[VectorEnv, str]:
    """N environments as one.

    Args:
        env_id: a registered id, or module:Id to import the module that registers it.
        vectorization: "entry-point" (the environment's own vector class), "sync" (one process), "grouped" (as many as
            `num_processes` says), "async" (a process each), or "auto": as `default_vectorization` says.
        num_threads: --num-threads, for "grouped".
        deadline: for making them, and for each process that runs some of them by itself.
        is_trial: as `GroupedVectorEnv` takes it.

    Returns:
        The vector environment and the vectorization chosen.

    Raises:
        UsageError: unknown id, missing dependency, wrong arguments, or they take too long to make; names the flag.
    """
    spec = find_spec(env_id)
    if vectorization == "auto":
        vectorization = default_vectorization(env_id)
    if vectorization == "entry-point" and spec.vector_entry_point is None:
        raise UsageError(
            f"--vectorization entry-point: {env_id} has no vector entry point of its own; use sync, grouped or auto"
        )
    if vectorization != "entry-point" and spec.entry_point is None:
        raise UsageError(
            f"--vectorization {vectorization}: {env_id} is registered with a vector entry point only; use entry-point or auto"
        )
    try:
        with warnings.catch_warnings(), deadline:
            warnings.simplefilter("ignore")  # gymnasium's advice on newer versions: the user chose this one
            envs = _make_vec(env_id, num_envs, vectorization, env_kwargs, num_threads, deadline, is_trial)
    except UsageError as error:  # ours: of an adapter inside the entry point, or of spaces that cannot be shared out
        raise UsageError(f"--env-id {env_id}: {error}") from None
    except gym.error.DependencyNotInstalled as error:
        raise UsageError(f"--env-id {env_id} needs a package that is not installed: {_remedy(spec, error)}") from None
    except ENVIRONMENT_ERRORS as error:
        if isinstance(error, TypeError) and "argument" in str(error):
            raise UsageError(f"--env-kwargs do not fit {env_id}: {first_line(error)}") from None
        raise UsageError(f"--env-id {env_id} cannot be made: {located(error)}") from None
    return envs, vectorization


def _make_vec(
    env_id: str,
    num_envs: int,
    vectorization: str,
    env_kwargs: Mapping[str, Any],
    num_threads: int | None,
    deadline: Deadline,
    is_trial: bool,
) -> VectorEnv:
    """As `make_vec`, with the vectorization chosen; raises whatever the environment does."""
    if vectorization == "entry-point":
        made = gym.make_vec(env_id, num_envs=num_envs, vectorization_mode="vector_entry_point", **env_kwargs)
        return SeededCartPole(made) if type(made) is CartPoleVectorEnv else made
    # the spec and not its id, which a process that does not share this one's imports may not know; envs/check.py is ours
    env_fns = [partial(gym.make, find_spec(env_id), disable_env_checker=True, **env_kwargs)] * num_envs
    if vectorization == "sync":
        return NumberedVectorEnv(env_fns)
    num_groups = num_envs if vectorization == "async" else num_processes(num_envs, num_threads)
    return GroupedVectorEnv(env_fns, num_groups, deadline, is_trial)


def num_processes(num_envs: int, num_threads: int | None) -> int:
    """K, groups of environments for "grouped": --num-threads, or as many as this process has cores; no more than there are."""
    return min(num_envs, num_threads or available_cores())


def default_vectorization(env_id: str) -> str:
    """What "auto" is without a trial: "entry-point" where the environment has a vector class of its own, else "sync"."""
    return "sync" if find_spec(env_id).vector_entry_point is None else "entry-point"


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The registered spec of `env_id`; raises UsageError with the nearest known ids."""
    name = import_module_of(env_id)
    if name not in gym.registry and (name.startswith("ALE/") or "NoFrameskip-v" in name):
        _register_atari(name)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        reason = "is not registered" if isinstance(error, gym.error.UnregisteredEnv) else first_line(error)
        raise UsageError(f"--env-id {name[:100]!r} {reason[:200]}{nearest(name, _newest_first(name))}") from None


def import_module_of(env_id: str) -> str:
    """Import the module of module:Id, so that it registers its environments, and return the Id; raises UsageError."""
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ENVIRONMENT_ERRORS as error:  # whatever somebody's module may raise; a script exits
            raise UsageError(f"--env-id {env_id}: module {module!r} cannot be imported: {located(error)}") from None
    return name


def _register_atari(name: str) -> None:
    """Import ale_py, which registers its games; raises UsageError where it is not installed."""
    try:
        import ale_py
    except ImportError:
        message = f"--env-id {name} needs a package that is not installed: {_INSTALL.format('atari')}"
        raise UsageError(message) from None
    gym.register_envs(ale_py)


_INSTALL = "pip install 'fastppo[{}]'"


def _remedy(spec: gym.envs.registration.EnvSpec, error: gym.error.DependencyNotInstalled) -> str:
    """Our extra that brings what a family of gymnasium's environments needs; for others, what the environment says."""
    for extra in ("mujoco", "box2d"):
        if str(spec.entry_point).startswith(f"gymnasium.envs.{extra}."):
            return _INSTALL.format(extra)
    return first_line(error)


def _newest_first(name: str) -> list[str]:
    """Registered ids; those with the same name and another version first in line for `nearest`, newest first."""
    family = name.rpartition("-v")[0] or name
    same = [env_id for env_id in gym.registry if env_id.rpartition("-v")[0].lower() == family.lower()]
    return sorted(same, reverse=True) or list(gym.registry)


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
