"""EnvPool's environments, stepped by its threads in C++, as a gymnasium vector environment.

Knows nothing of learning. Does not import torch.
"""

import importlib.util
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.envs.atari import MAX_FRAMES, NO_FIRE, AtariSettings, refuse_own, with_lives
from fastppo.envs.registry import first_line
from fastppo.errors import UsageError, brief, nearest
from fastppo.system.cpus import engine_threads

SEEDS = 2**31  # EnvPool's are below it
STATE = ("obs", "reward", "done", "trunc", "elapsed_step")  # the parts of a step's result that are not infos
PLAYERS = "players.env_id"  # the environment of each player


class EnvPoolVectorEnv(VectorEnv):
    """N environments of one EnvPool task: NEXT_STEP autoreset, arrays in and out.

    EnvPool is seeded only when a pool is made, so a reset with a seed makes a new pool. Every returned array is new. An episode
    that reaches its time limit is truncated and not terminated, even if it also terminates in that step: EnvPool does not
    distinguish the two.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}  # noqa: RUF012 (gymnasium's own convention)

    def __init__(self, task: str, num_envs: int, **kwargs: Any) -> None:
        """Read the task's spaces. The first reset starts the threads.

        Args:
            task: one of envpool.list_all_envs().
            kwargs: what envpool.make takes.

        Raises:
            TypeError: arguments that the task does not take.
        """
        import envpool

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium's, on bounds that EnvPool gives as float64
            spec = envpool.make_spec(task, num_envs=num_envs, **kwargs)
            self.single_observation_space = spec.gymnasium_observation_space
            self.single_action_space = spec.gymnasium_action_space
        self.config = spec.config
        self.num_envs = num_envs
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._make_pool = partial(envpool.make, task, env_type="gymnasium", num_envs=num_envs, **kwargs)
        self._pool: Any = None
        self._raw: RawPool | None = None

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start all environments anew.

        Args:
            seed: of all random numbers from here on, or one for each environment; None: they continue, at first from the
                system's entropy.
            options: not used.

        Returns:
            obs (N, *obs_shape), info.
        """
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is None and self._pool is None:
            seed = int(self.np_random.integers(SEEDS))
        if seed is not None:
            self.close_extras()
            self._pool = self._make_pool(seed=seed % SEEDS if isinstance(seed, int) else [one % SEEDS for one in seed])
            self._raw = RawPool.of(self._pool, num_envs=self.num_envs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same warning: the pool makes its spaces when they are first used
            obs, info = self._pool.reset()
        return obs, info

    def step(self, actions: NDArray[Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments; those that ended in the last step reset instead.

        Args:
            actions: (N, *action_shape), any dtype: EnvPool gets its own.

        Returns:
            obs (N, *obs_shape), reward (N,) float32, terminated (N,) bool, truncated (N,) bool, info.
        """
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Begin a step in the pool's threads, with actions as `step` takes them."""
        if self._raw is None:
            self._pool.send(actions)
        else:
            self._raw.send(actions)

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait for its end: what `step` returns."""
        result: tuple[Any, Any, Any, Any, dict[str, Any]]
        result = self._pool.recv(reset=False, return_info=True) if self._raw is None else self._raw.receive()
        return result

    def close_extras(self, **kwargs: Any) -> None:
        """Release the threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = self._raw = None


class RawPool:
    """A pool stepped through its two functions in C++, without EnvPool's Python code around them.

    That code packs and unpacks trees in each step and looks up every setting: 65 of the 370 us of a step of eight HalfCheetahs
    on two cores (benchmarks/LOG.md).
    """

    @classmethod
    def of(cls, pool: Any, num_envs: int) -> "RawPool | None":
        """None if observation, action or info is a tree, or this version of EnvPool has another structure."""
        keys = list(getattr(pool, "_state_keys", ()))
        action_keys = list(getattr(getattr(pool, "_spec", None), "_action_keys", ()))
        infos = {key.removeprefix("info:"): place for place, key in enumerate(keys) if key.startswith("info:")}
        is_known = {*STATE, f"info:{PLAYERS}"} <= set(keys) and action_keys == ["env_id", PLAYERS, "action"]
        is_flat = not any("." in name or ":" in name for name in infos if name != PLAYERS)
        if not (is_known and is_flat and hasattr(pool, "_send") and hasattr(pool, "_recv")):
            return None
        return cls(pool, num_envs, [keys.index(key) for key in STATE], infos)

    def __init__(self, pool: Any, num_envs: int, places: list[int], infos: dict[str, int]) -> None:
        """places: of STATE in the list that the pool returns; infos: place by name, with PLAYERS."""
        self._send, self._recv = pool._send, pool._recv
        self._ids = np.arange(num_envs, dtype=np.int32)
        action = pool.spec.action_array_spec["action"]
        self._dtype, self._shape = action.dtype, (num_envs, *(size for size in action.shape if size != -1))
        self._places, self._players = places, infos[PLAYERS]
        self._infos = [(name, place) for name, place in infos.items() if name != PLAYERS]

    def send(self, actions: NDArray[Any]) -> None:
        """As the pool's own `send`. Raises ValueError for actions of another shape, which the pool would not check."""
        if actions.shape != self._shape:
            raise ValueError(f"actions of shape {actions.shape} instead of {self._shape}")
        self._send([self._ids, self._ids, np.ascontiguousarray(actions, dtype=self._dtype)])

    def receive(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The results of a step, as of the pool's own `recv`."""
        state = self._recv()
        obs, reward, done, truncated, elapsed = (state[place] for place in self._places)
        info: dict[str, Any] = {name: state[place] for name, place in self._infos}
        info |= {"players": {"env_id": state[self._players]}, "elapsed_step": elapsed}
        return obs, reward, done & ~truncated, truncated, info


def make_envpool(env_id: str, num_envs: int, env_kwargs: Mapping[str, Any], settings: AtariSettings) -> VectorEnv:
    """N environments of EnvPool's task with this id; Atari with `settings`, as in `make_ale`.

    Args:
        env_id: EnvPool's name of a task, or ALE's of a game: ALE/Breakout-v5 and BreakoutNoFrameskip-v4 are Breakout-v5.
        env_kwargs: further arguments of envpool.make.

    Raises:
        UsageError: as `task_of`, or an argument that the task does not take or that a flag sets; names it.
    """
    task = task_of(env_id)
    refuse_own(env_id, env_kwargs, ("num_envs", "batch_size", "seed", "env_seed", "env_type"))
    env_kwargs = {**engine_threads(num_envs), **env_kwargs}
    try:
        envs = EnvPoolVectorEnv(task, num_envs, **env_kwargs)
        is_atari = hasattr(envs.config, "repeat_action_probability")
        if is_atari:
            own = envpool_arguments(settings)
            refuse_own(env_id, env_kwargs, tuple(own))
            own["max_episode_steps"] = MAX_FRAMES // settings.frame_skip
            envs = EnvPoolVectorEnv(task, num_envs, **{**own, **env_kwargs})
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise UsageError(f"--env-kwargs do not fit {task} of EnvPool: {first_line(error)}") from None
    except Exception as error:
        raise UsageError(f"--env-id {env_id} cannot be made by EnvPool: {brief(error)}") from None
    if envs.config.max_num_players != 1:
        raise UsageError(
            f"--env-id {env_id}: EnvPool's {task} is a game of {envs.config.max_num_players} players; one is wanted"
        )
    if is_atari:
        return with_lives(envs, settings, has_fire=settings.full_action_space or envs.config.task not in NO_FIRE)
    return envs


def task_of(env_id: str) -> str:
    """EnvPool's name for an id of gymnasium's, without the module before it.

    Raises:
        UsageError: EnvPool is not installed, or has no such task; names the nearest that it has.
    """
    if importlib.util.find_spec("envpool") is None:
        raise UsageError("--backend envpool needs a package that is not installed: pip install 'fastppo[envpool]'")
    import envpool

    tasks = envpool.list_all_envs()
    name = env_id.rpartition(":")[2]
    game = name.removeprefix("ALE/").replace("TicTacToe3D", "TicTacToe3d").replace("NoFrameskip-v4", "-v5")
    task = next((known for known in (name, game) if known in tasks), None)
    if task is None:
        raise UsageError(f"--env-id {env_id!r}: EnvPool has no {game}{nearest(game, tasks)}")
    return task


def envpool_arguments(settings: AtariSettings) -> dict[str, Any]:
    """Our Atari settings by EnvPool's names."""
    return {
        "noop_max": max(settings.noop_max, 1),  # it draws from 1 to noop_max, FIRE counted in, and crashes at 0
        "frame_skip": settings.frame_skip,
        "img_height": settings.screen_size,
        "img_width": settings.screen_size,
        "gray_scale": settings.grayscale,
        "stack_num": settings.frame_stack,
        "repeat_action_probability": settings.sticky_actions,
        "use_fire_reset": settings.fire_reset,
        "full_action_space": settings.full_action_space,
        "episodic_life": False,
        "reward_clip": False,
    }
