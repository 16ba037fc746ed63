"""Which environments a run has and who steps them: the one place where environments are chosen and made.

`EnvConfig` says which environment, how many of it, and the engine. `make_envs` makes them. `make_training_envs` decides by
short trials what --vectorization auto means, then makes them.

An environment without a vector class of its own runs in one process or in several. One copy of it says how long a step takes
and whether it computes or waits (envs/check.py). Where processes promise to be faster, the run's environments are made in
processes and stepped; if they are faster, the run keeps them.

Knows nothing of policies. Imports torch only for environments on the device.
"""

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import gymnasium as gym
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from fastppo.envs.agents import with_agent_rows
from fastppo.envs.atari import AtariSettings, make_ale, refuse_wrappers
from fastppo.envs.cartpole import SeededCartPole
from fastppo.envs.check import ONE_BY_ONE, Tried, try_copy
from fastppo.envs.check_ends import leaves
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.envpool import make_envpool
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.numbered import ONLY_SOME, SUCCESS, EnvFn, NumberedVectorEnv
from fastppo.envs.preprocessing import Preprocessing, said_of_text
from fastppo.envs.registry import INSTALL, find_spec, first_line, import_module_of, is_atari, is_jax
from fastppo.envs.streams import untouched_streams
from fastppo.envs.wrappers import wrapped
from fastppo.errors import ENVIRONMENT_ERRORS, ForkHangs, UsageError, brief, located, nearest
from fastppo.random_streams import Stream, environment_seed, seed_of
from fastppo.system.cpus import available_cores

if TYPE_CHECKING:
    import torch

    from fastppo.envs.device import DeviceEnv, TorchVectorEnv

PROBE_STEPS = 50
PROBE_SECONDS = 0.5
# Steps shorter than GROUPED_FROM gain nothing from other processes, and no process is started to find out. Handing over to two
# groups and back takes 55 to 75 us (benchmarks/LOG.md), and half of such a step saves as much. Handing over to more processes
# than cores takes longer (gymnasium's AsyncVectorEnv 570 us for eight CartPoles on two), and is better only for environments
# that wait, for another program for example.
GROUPED_FROM = 150e-6
ASYNC_FROM = 5e-3
WAITS_BELOW = 0.5  # an environment that computes for a smaller share of its step waits
BETTER = 0.9  # more processes are worth it at this share, or less, of the time that one process takes
ALIKE_RESETS = 4  # environments of two processes that start alike in so many resets have copies of one generator


@dataclass(frozen=True)
class EnvConfig:
    """Which environments, how many, and who steps them."""

    env_id: str
    """A registered id; module:Id, to import the module that registers it; or module:function."""
    num_envs: int = 1
    """N, of each seed."""
    vectorization: str = "auto"
    """"entry-point" (the environment's own vector class), "sync" (one process), "grouped" (as many as `num_processes` says),
    "async" (a process each) or "auto". For gymnasium's environments; ALE's games have only their own vector class."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment's constructor; `max_episode_steps` is a time limit."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    """Wrappers of each environment, for those that are made one by one."""
    backend: str = "auto"
    """"torch", on the device; "envpool"; "gymnasium", stepped by calls from Python whatever the class; "auto": "torch" where
    the id's own vector class is a `TorchVectorEnv`, else "gymnasium"."""
    num_threads: int | None = None
    """Number of processes for "grouped"; None: as many as there are cores."""
    atari: AtariSettings = field(default_factory=AtariSettings)
    """For Atari's games, in ALE and in EnvPool."""
    num_seeds: int = 1
    """S, for `make_training_envs`."""
    autoreset: str = "auto"
    """"same-step" or "next-step": when environments that are made one by one are reset; "auto": in the next step."""
    log_info: tuple[str, ...] = ()
    """Further names of numbers in the infos to be read, beside SUCCESS."""
    halves: bool = False
    """For `make_training_envs`: two halves, of which one steps while the policy acts for the other (envs/halves.py)."""
    half: int | None = None
    """0 or 1: these N environments are that half of a run's, all in processes if in any; None: they are all."""

    @property
    def info_names(self) -> tuple[str, ...]:
        """The numbers that are read from the info of an episode's last step."""
        return tuple(dict.fromkeys((SUCCESS, *self.log_info)))


class VectorizationChoice(NamedTuple):
    """A vectorization, the reason for it, and the environments of the run where the trial has made them."""

    vectorization: str
    reason: str
    envs: VectorEnv | None = None


class MadeEnvs(NamedTuple):
    """The environments of a run, which engine steps them (see `engine_name`), and the reason."""

    envs: VectorEnv
    engine: str
    reason: str


def make_envs(config: EnvConfig, device: "torch.device | str" = "cpu", deadline: Deadline = NO_DEADLINE) -> VectorEnv:
    """N environments as one vector environment, without a trial; of A agents each, N * A rows.

    Args:
        device: for a `TorchVectorEnv`.
        deadline: for making them, and for each process that runs some of them.

    Raises:
        UsageError: unknown id, missing dependency, wrong arguments, or they take too long to make; names the flag.
    """
    return with_agent_rows(_make_envs(config, device, deadline))


def _make_envs(config: EnvConfig, device: "torch.device | str", deadline: Deadline) -> VectorEnv:
    """`make_envs`, with several agents of an environment as one row (envs/agents.py)."""
    if config.backend == "torch":
        return make_device_envs(config, device)
    if config.backend == "envpool":
        return make_envpool(config.env_id, config.num_envs, config.env_kwargs, config.atari)
    if is_atari(config.env_id):
        refuse_wrappers(config.env_id, config.env_kwargs, config.preprocessing)
        if config.vectorization not in ("auto", "entry-point"):
            raise UsageError(
                f"--vectorization {config.vectorization} is not for {config.env_id}: "
                "ALE steps all games in its own threads; leave it at auto"
            )
        return make_ale(config.env_id, config.num_envs, config.env_kwargs, config.atari)
    if is_jax(config.env_id):
        config = replace(config, env_kwargs={"device": str(device), **config.env_kwargs})
    envs = make_gymnasium_envs(config, deadline)
    if not is_on_device(envs.unwrapped):
        return envs
    if config.backend == "gymnasium":
        return VectorWrapper(envs)  # no longer an instance of TorchVectorEnv
    envs.close()
    return _on_device(envs.unwrapped.env, config.num_envs, device)


def make_training_envs(
    config: EnvConfig,
    device: "torch.device | str",
    deadline: Deadline = NO_DEADLINE,
    tried: Callable[[], Tried] | None = None,
) -> MadeEnvs:
    """The environments of a run, S times N of them; `tried` as `choose_vectorization` takes it. Raises as `make_envs`."""
    if config.halves:
        from fastppo.envs.halves import make_halves  # here, since it imports torch

        if are_one_by_one(config) and config.vectorization == "auto":
            config = replace(config, vectorization="grouped")
        in_halves = make_halves(config, str(device) == "cpu", lambda half: _make_envs(half, device, deadline))
        return MadeEnvs(in_halves, engine_name(in_halves, config), "in two halves, as --env-halves says")
    every = replace(config, num_envs=config.num_envs * config.num_seeds)
    choice = VectorizationChoice("auto", f"as --backend {config.backend} asks")
    if config.backend in ("auto", "gymnasium"):
        choice = choose_vectorization(every, deadline, tried)
    config, every = (replace(one, vectorization=choice.vectorization) for one in (config, every))

    def make(num_envs: int) -> VectorEnv:
        return _make_envs(replace(config, num_envs=num_envs), device, deadline)

    if config.num_seeds == 1:
        envs = make(config.num_envs) if choice.envs is None else choice.envs
    else:
        from fastppo.envs.multi_seed_envs import SeedsVectorEnv, many  # here, since it imports torch

        if f"gymnasium/{choice.vectorization}" in ONE_BY_ONE:
            envs = SeedsVectorEnv(make(every.num_envs) if choice.envs is None else choice.envs, config.num_seeds)
        else:
            envs = many(make, config.num_envs, config.num_seeds, config.info_names)
    return MadeEnvs(with_agent_rows(envs), engine_name(envs, config), choice.reason)


def engine_name(envs: VectorEnv, config: EnvConfig) -> str:
    """ "torch", "envpool", "ale" or "gymnasium/VECTORIZATION": what steps the environments that were made from `config`."""
    if is_on_device(envs):
        return "torch"
    if config.backend == "envpool":
        return "envpool"
    return "ale" if is_atari(config.env_id) else f"gymnasium/{config.vectorization}"


# --- in one process or in several


def choose_vectorization(
    config: EnvConfig, deadline: Deadline = NO_DEADLINE, tried: Callable[[], Tried] | None = None
) -> VectorizationChoice:
    """What --vectorization means for this environment on this machine: "entry-point", "sync", "grouped" or "async".

    Args:
        tried: returns the result of `try_copy`; called where the choice depends on it. None: a copy is made here.

    Raises:
        UsageError: as `make_envs`.
    """
    if config.vectorization != "auto":
        return VectorizationChoice(config.vectorization, "as --vectorization asks")
    if is_atari(config.env_id):
        return VectorizationChoice("entry-point", "ALE's own vector environment")
    if default_vectorization(config) == "entry-point":
        return VectorizationChoice("entry-point", "the environment's own vector class")
    if config.num_envs == 1:
        return VectorizationChoice("sync", "one environment")
    num_groups = num_processes(config.num_envs, config.num_threads)
    if num_groups == 1:
        return VectorizationChoice("sync", "one core")
    copy = try_copy(env_maker(config), config.num_envs, deadline) if tried is None else tried()
    sync = config.num_envs * copy.step_seconds
    if sync == float("inf"):
        return VectorizationChoice("sync", "a trial step failed")
    if sync < GROUPED_FROM:
        return VectorizationChoice("sync", f"a step takes {sync * 1e3:.2f} ms, too little to share out")
    waits = sync >= ASYNC_FROM and copy.computing < WAITS_BELOW
    vectorization, count = ("async", config.num_envs) if waits else ("grouped", num_groups)
    return _try_processes(replace(config, vectorization=vectorization), count, sync, copy.varies, deadline)


def _try_processes(config: EnvConfig, count: int, sync: float, varies: bool, deadline: Deadline) -> VectorizationChoice:
    """Make the environments in `count` processes and step them; "sync" unless they are clearly faster than `sync` seconds."""
    reason = f"a step takes {sync * 1e3:.2f} ms in one process"
    envs: VectorEnv | None = None
    try:
        envs = make_gymnasium_envs(config, deadline, is_trial=True)
        with untouched_streams():
            same = start_alike(envs, -(-config.num_envs // count), varies, deadline)
            taken = step_seconds(envs, deadline)
    except ENVIRONMENT_ERRORS as error:  # an environment that fails here fails in training too, where it is reported
        _close(envs, deadline)
        hangs = isinstance(error, ForkHangs) or isinstance(error.__context__, ForkHangs)
        how = "hang: a fork has none of the threads that the environment's module has started" if hangs else "failed"
        return VectorizationChoice("sync", f"{reason}; those of a trial in {count} {how}")
    reason += f", {taken * 1e3:.2f} ms in {count}"
    if same or taken >= BETTER * sync:
        _close(envs, deadline)
        reason += ", where they start alike: the environment's module has a random generator" if same else ""
        return VectorizationChoice("sync", reason)
    return VectorizationChoice(config.vectorization, reason, envs)


def num_processes(num_envs: int, num_threads: int | None) -> int:
    """Groups for "grouped": --num-threads, or as many as this process has cores; at most one for each environment."""
    return min(num_envs, num_threads or available_cores())


def start_alike(envs: VectorEnv, size: int, varies: bool, deadline: Deadline = NO_DEADLINE) -> bool:
    """Reset `envs`; whether those in a second process start as the first `size` do, though an environment's starts vary.

    They start alike in every reset where the fork has copied a generator of the environment's module and no reset seeds it.
    """
    space, number = envs.single_observation_space, min(size, envs.num_envs - size)
    for seed in range(ALIKE_RESETS):
        with deadline:
            obs, _ = envs.reset(seed=environment_seed(seed, Stream.PROBE_ENVIRONMENTS))
        if not varies or not all((leaf[:number] == leaf[size : size + number]).all() for leaf in leaves(obs, space)):
            return False
    return True


def step_seconds(envs: VectorEnv, deadline: Deadline = NO_DEADLINE) -> float:
    """Mean seconds of at most PROBE_STEPS steps with random actions; raises what an environment raises."""
    envs.action_space.seed(seed_of(0, Stream.PROBE_ACTIONS))
    started = time.perf_counter()
    steps = 0
    while steps < PROBE_STEPS and time.perf_counter() - started < PROBE_SECONDS:
        with deadline:
            envs.step(envs.action_space.sample())
        steps += 1
    return (time.perf_counter() - started) / steps


def _close(envs: VectorEnv | None, deadline: Deadline) -> None:
    if envs is not None:
        with contextlib.suppress(*ENVIRONMENT_ERRORS), deadline:
            envs.close()


# --- gymnasium's environments


def make_gymnasium_envs(config: EnvConfig, deadline: Deadline = NO_DEADLINE, is_trial: bool = False) -> VectorEnv:
    """N environments of gymnasium's registry; "auto" as `default_vectorization`.

    Args:
        is_trial: as `GroupedVectorEnv` takes it.

    Raises:
        UsageError: as `make_envs`.
    """
    env_id, spec = config.env_id, find_spec(config.env_id)
    vectorization = default_vectorization(config) if config.vectorization == "auto" else config.vectorization
    for flag in config.preprocessing.flags if vectorization == "entry-point" else ():
        raise UsageError(
            f"{flag} wraps environments one by one, and {env_id} steps all in its own vector class: "
            + ("leave it off" if spec.entry_point is None else "use --vectorization auto, or leave it off")
        )
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
            warnings.simplefilter("ignore")  # gymnasium advises newer versions: the user chose this one
            return _make_gymnasium(replace(config, vectorization=vectorization), deadline, is_trial)
    except UsageError as error:  # from an adapter inside the entry point, or spaces that processes cannot share
        raise UsageError(f"--env-id {env_id}: {error}") from None
    except gym.error.DependencyNotInstalled as error:
        raise UsageError(f"--env-id {env_id} needs a package that is not installed: {_remedy(spec, error)}") from None
    except ENVIRONMENT_ERRORS as error:
        if isinstance(error, TypeError) and "argument" in str(error):
            said = first_line(error).partition(" was raised from the environment creator")[0]  # gymnasium adds that
            raise UsageError(f"--env-kwargs do not fit {env_id}: {said}") from None
        hint = f"; {ONLY_SOME}" if ONLY_SOME in getattr(error, "__notes__", ()) else said_of_text(config.env_kwargs)
        raise UsageError(f"--env-id {env_id} cannot be made: {located(error)}{hint}") from None


def _make_gymnasium(config: EnvConfig, deadline: Deadline, is_trial: bool) -> VectorEnv:
    """As `make_gymnasium_envs`, for one vectorization; raises what the environment raises."""
    num_envs = config.num_envs
    if config.vectorization == "entry-point":
        spec, mode = find_spec(config.env_id), "vector_entry_point"
        envs = gym.make_vec(spec, num_envs=num_envs, vectorization_mode=mode, **config.env_kwargs)
        return SeededCartPole(envs) if type(envs) is CartPoleVectorEnv else envs
    env_fns = [env_maker(config)] * num_envs
    autoreset = AutoresetMode.SAME_STEP if config.autoreset == "same-step" else AutoresetMode.NEXT_STEP
    if config.vectorization == "sync":
        return NumberedVectorEnv(env_fns, mode=autoreset, info_names=config.info_names)
    num_groups = num_envs if config.vectorization == "async" else num_processes(num_envs, config.num_threads)
    first = None if config.half is None else config.half * num_envs
    return GroupedVectorEnv(env_fns, num_groups, deadline, is_trial, autoreset, config.info_names, first)


def default_vectorization(config: EnvConfig) -> str:
    """What "auto" is without a trial: "entry-point" where the environment has a vector class of its own, else "sync".

    Wrappers need environments that are made one by one, if there are such.
    """
    spec = find_spec(config.env_id)
    wraps = spec.entry_point is not None and config.preprocessing.flags
    return "sync" if spec.vector_entry_point is None or wraps else "entry-point"


def are_one_by_one(config: EnvConfig) -> bool:
    """Whether the environments are made one by one. Raises UsageError for an unknown id."""
    if config.backend not in ("auto", "gymnasium") or is_atari(config.env_id):
        return False
    return (default_vectorization(config) if config.vectorization == "auto" else config.vectorization) != "entry-point"


def env_maker(config: EnvConfig) -> EnvFn:
    """A function that makes one environment, here or in another process. Raises UsageError for an unknown id."""
    # the spec and not its id, which a process without this one's imports may not know; envs/check.py replaces the checker
    return partial(_make_one, find_spec(config.env_id), config.env_kwargs, config.preprocessing)


def _make_one(spec: gym.envs.registration.EnvSpec, kwargs: Mapping[str, Any], settings: Preprocessing) -> gym.Env[Any, Any]:
    return wrapped(gym.make(spec, disable_env_checker=True, **kwargs), settings)


def _remedy(spec: gym.envs.registration.EnvSpec, error: gym.error.DependencyNotInstalled) -> str:
    """The extra of fastppo that installs what gymnasium's MuJoCo and Box2D need; for others, what the environment says."""
    for extra in ("mujoco", "box2d"):
        if str(spec.entry_point).startswith(f"gymnasium.envs.{extra}."):
            return INSTALL.format(extra)
    return first_line(error)


# --- environments on the device


def make_device_envs(config: EnvConfig, device: "torch.device | str", render_mode: str | None = None) -> "TorchVectorEnv":
    """N environments on the device.

    Args:
        config: its env_id is in `CLASSIC`, or is registered with a vector_entry_point that builds a `TorchVectorEnv`. That
            entry point need not know of devices or render modes: its `env` is wrapped again here.
        render_mode: None or "rgb_array".

    Raises:
        UsageError: an id without such an environment, or arguments that do not fit it; names the flag.
    """
    from fastppo.envs.classic import CLASSIC

    env_id, name = config.env_id, import_module_of(config.env_id)
    try:
        env = CLASSIC[name](**config.env_kwargs) if name in CLASSIC else _registered_device_env(config, name, list(CLASSIC))
        envs = _on_device(env, config.num_envs, device, render_mode)
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


def _registered_device_env(config: EnvConfig, name: str, built_in: list[str]) -> "DeviceEnv":
    """The `DeviceEnv` that the vector entry point of a registered id wraps."""
    spec = find_spec(config.env_id) if ":" in config.env_id else gym.registry.get(name)
    if spec is not None and spec.vector_entry_point is not None:
        envs = make_gymnasium_envs(replace(config, vectorization="entry-point"))
        envs.close()
        if is_on_device(envs.unwrapped):
            return envs.unwrapped.env
    hint = "" if spec is not None else nearest(name, [key for key, value in gym.registry.items() if _is_custom_vector(value)])
    raise UsageError(
        f"--backend torch has no {name}; it has: {', '.join(sorted(built_in))} "
        f'(or register your own: docs/environments.md, "Your own environment on the device"){hint}'
    )


def _is_custom_vector(spec: gym.envs.registration.EnvSpec) -> bool:
    """Registered with a vector environment that is not gymnasium's."""
    return spec.vector_entry_point is not None and not str(spec.vector_entry_point).startswith("gymnasium.")


def is_on_device(envs: Any) -> "TypeGuard[TorchVectorEnv]":
    """Whether `envs` is a `TorchVectorEnv`; does not import torch."""
    module = sys.modules.get("fastppo.envs.device")
    return module is not None and isinstance(envs, module.TorchVectorEnv)


def _on_device(
    env: "DeviceEnv", num_envs: int, device: "torch.device | str", render_mode: str | None = None
) -> "TorchVectorEnv":
    from fastppo.envs.device import TorchVectorEnv

    return TorchVectorEnv(env, num_envs, device, render_mode)
