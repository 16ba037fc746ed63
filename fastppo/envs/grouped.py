"""N environments in K groups, each in a process of its own: `--vectorization sync` (K = 1), `grouped` and `async` (K = N).

For environments that are slow in Python, `grouped` has as many groups as cores. A process each costs more than it gives where
there are fewer cores than environments: by gymnasium's AsyncVectorEnv eight HalfCheetahs on two cores step in 1165 us, and in
585 in one process. Two groups, each a loop over its own, take 348 us (benchmarks/LOG.md). The first group is this process's,
which would only wait otherwise; what they exchange lies in shared memory, and a byte in a pipe says go and done (8 us for both;
through a socket 13, and spinning before blocking keeps a core busy to save 4).

An environment that raises, exits or hangs is named by its number, whichever process it is in; where its process was killed, or
hangs in C, by the numbers of its group. Same seed, same bits as gymnasium's SyncVectorEnv, however many groups there are. Knows
nothing of policies, costs no torch.
"""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space, create_shared_memory, read_from_shared_memory

from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, NoAnswer, UsageError, brief

EnvFn = Callable[[], gym.Env[Any, Any]]

# The infos that are read (envs/autoreset.py). Others stay where they are: gathering HalfCheetah's takes a seventh of a step.
INFO_KEYS = ("action_mask", "game_over")
# gymnasium's choice too: a forked process shares the imports of this one, which take seconds, and knows every environment that
# was registered here. Elsewhere than on Linux system libraries do not survive a fork, and Python's own default is taken.
START_METHOD = "fork" if sys.platform == "linux" else None
CLOSE_SECONDS = 1.0  # that processes have for closing their environments, or finishing a step, before they are ended
NAME_SECONDS = 1.0  # that a process has beyond the deadline, its own too, for saying which environment let it pass

STEP, RESET, CLOSE = b"s", b"r", b"c"  # to a worker
DONE, INFO, FAILED = b"d", b"i", b"f"  # from a worker; the last two are followed by a message


class NumberedVectorEnv(SyncVectorEnv):  # before gymnasium 1.4 it takes no type arguments
    """Environments first, first + 1, ... in this process: gymnasium's, but it names the one that fails, and copies less.

    Returned observations are reused between steps: copy what is to be kept. Of infos, only INFO_KEYS are returned.
    """

    def __init__(self, env_fns: Sequence[EnvFn], first: int = 0) -> None:
        """Make the environments; `first` is the number of env_fns[0]. Raises whatever making one does."""
        super().__init__([partial(_Numbered.make, env_fn, first + i) for i, env_fn in enumerate(env_fns)], copy=False)

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        read = {key: env_info[key] for key in INFO_KEYS if key in env_info}
        return super()._add_info(vector_infos, read, env_num) if read else vector_infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments, once: gymnasium before 1.4 tries again, and prints what is raised, when this is collected."""
        self.closed = True
        super().close_extras(**kwargs)


class _Numbered(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that says its number when it fails."""

    def __init__(self, env: gym.Env[Any, Any], number: int) -> None:
        super().__init__(env)
        self.metadata = dict(env.metadata)  # before gymnasium 1.4 SyncVectorEnv writes to it, and it is its class's
        self.number = number

    @classmethod
    def make(cls, env_fn: EnvFn, number: int) -> "_Numbered":
        try:
            return cls(env_fn(), number)
        except NoAnswer as error:  # what it raises says by its type which flag is wrong
            raise EnvironmentFailed(f"environment {number}: {brief(error)}") from error

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return self.env.reset(**kwargs)
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {brief(error)}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            return self.env.step(action)
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {brief(error)}") from error


class GroupedVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments in K groups of nearly equal size, one of them in this process and K - 1 in processes of their own.

    Returned observations, (N, ...), are one batch for all groups, reused between steps as rewards (N,) float64, terminated and
    truncated (N,) bool are: copy what is to be kept. Resets on the next step, as SyncVectorEnv; of infos, only INFO_KEYS are
    returned. Actions are cast to the dtype of the space. An environment that fails ends all: the processes are gone when the
    error arrives, which arrives again should anybody go on.
    """

    def __init__(self, env_fns: Sequence[EnvFn], num_groups: int, deadline: Deadline = NO_DEADLINE) -> None:
        """Make the environments, each where it will run; env_fns[0] says which spaces all of them have.

        Args:
            env_fns: N functions that make one environment each.
            num_groups: K, at most N.
            deadline: the one that steps and resets are called under. Other processes have one of as many seconds, and when one
                of them lets even that pass it is given up.

        Raises:
            UsageError: a space that arrays cannot hold.
            EnvironmentFailed: an environment of another process could not be made.
            Exception: whatever making one in this process raised.
        """
        self.num_envs = len(env_fns)
        edges = [-(-group * self.num_envs // num_groups) for group in range(num_groups + 1)]  # the larger groups first
        self._workers: list[_Worker] = []
        self._failure: BaseException | None = None
        self._deadline = deadline
        self._group = NumberedVectorEnv(env_fns[: edges[1]])
        deadline.lift()  # what follows waits for processes that have their own
        self.metadata = {**self._group.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = self._group.render_mode
        self.single_observation_space = self._group.single_observation_space
        self.single_action_space = self._group.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        try:
            exchanged = _exchanged(self.single_observation_space, self.single_action_space)
            context = multiprocessing.get_context(START_METHOD)
            memory = create_shared_memory(_allocated(exchanged), self.num_envs, context)  # type: ignore[arg-type]
            self._batch: Any = read_from_shared_memory(exchanged, memory, self.num_envs)
            self._rows = _rows(self._batch, slice(0, edges[1]))
            for start, stop in pairwise(edges[1:]):
                self._workers.append(_Worker(context, env_fns, slice(start, stop), exchanged, memory, self._workers, deadline))
            for worker in self._workers:
                worker.result()
        except BaseException:
            self._give_up()
            raise

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """New episodes, all of them: obs (N, ...), info. Environment i is seeded with seed + i, or seed[i]; None: none is."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else list(seed or [None] * self.num_envs)
        info = self._run(RESET, partial(_reset, self._group, self._rows), (seeds, options))
        return self._batch["obs"], info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions (N, ...) -> obs (N, ...), reward, terminated, truncated (N,), info."""
        _copy(self._batch["action"], actions)
        info = self._run(STEP, partial(_step, self._group, self._rows))
        batch = self._batch
        return batch["obs"], batch["reward"], batch["terminated"], batch["truncated"], info

    def _run(self, command: bytes, own: Callable[..., dict[str, Any]], message: Any = None) -> dict[str, Any]:
        """One command for all groups at once; `own` is this process's part. Whatever goes wrong, nothing goes on after it."""
        if self._failure is not None:
            raise self._failure
        if self.closed:
            raise gym.error.ClosedEnvironmentError("these environments have been closed")
        try:
            for worker in self._workers:
                worker.send(command, message)
            infos = [own() if message is None else own(message)]
            self._deadline.lift()
            infos += [worker.result() for worker in self._workers]
        except BaseException as error:
            self._failure = error if isinstance(error, ENVIRONMENT_ERRORS) else None
            self._give_up()
            raise
        return self._join(infos) if any(infos) else {}

    def _give_up(self) -> None:
        """Close after something went wrong, which is what counts: environments that fail to close as well are not told of."""
        with contextlib.suppress(*ENVIRONMENT_ERRORS):
            self.close()
        self.closed = True

    def _join(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The groups' infos as one, as SyncVectorEnv would have it: 0 or None, and False under _key, where nothing was told."""
        joined: dict[str, Any] = {}
        sizes = [self._group.num_envs, *(worker.num_envs for worker in self._workers)]
        for key in dict.fromkeys(key for info in infos for key in info):
            like = next(info[key] for info in infos if key in info)
            untold = None if like.dtype == object else 0
            parts = [
                info[key] if key in info else np.full((size, *like.shape[1:]), untold, like.dtype)
                for info, size in zip(infos, sizes, strict=True)
            ]
            joined[key] = np.concatenate(parts)
        return joined

    def close_extras(self, **kwargs: Any) -> None:
        """Close all environments. A process that does not end in CLOSE_SECONDS is ended, one that hangs in a step too."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.ask_to_close()
        try:
            self._group.close()
        finally:
            self._deadline.lift()
            latest = time.monotonic() + CLOSE_SECONDS
            for worker in workers:
                worker.end(latest)


class _Worker:
    """This process's end of another one that runs a group of environments."""

    def __init__(
        self,
        context: BaseContext,
        env_fns: Sequence[EnvFn],
        rows: slice,
        exchanged: Dict,
        memory: Any,
        earlier: "Sequence[_Worker]",
        deadline: Deadline,
    ) -> None:
        """Start it on environments `rows`; `result` then says whether they could be made."""
        self.rows, self.num_envs = rows, rows.stop - rows.start
        commands, self._commands = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        self._message, self._poll = deadline.message, select.poll()
        self._patience = min(deadline.seconds + NAME_SECONDS, 2e6) * 1e3 if deadline.seconds else None  # ms, of 31 bits
        self._poll.register(self._answers, select.POLLIN)
        # A forked process has copies of these ends, and closes them: that its parent is gone it notices by the end of a pipe
        # that nobody else can write to.
        forked = context.get_start_method() == "fork"
        parents = [end for worker in (*earlier, self) for end in (worker._commands, worker._answers)] if forked else []
        wrapped = [CloudpickleWrapper(env_fn) for env_fn in env_fns[rows]]
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_work,
            args=(commands, answers, parents, wrapped, rows, len(env_fns), exchanged, memory, deadline.seconds),
            name=f"fastppo-environments-{rows.start}",
            daemon=True,
        )
        self._process.start()
        commands.close()  # the other process has them now: its end is noticed by the end of the pipe of answers
        answers.close()

    def send(self, command: bytes, message: Any = None) -> None:
        """Raises EnvironmentFailed where the process is gone."""
        try:
            os.write(self._commands.fileno(), command)  # half of what Connection.send costs
            if message is not None:
                self._commands.send(message)
        except BrokenPipeError:
            raise self._death() from None

    def result(self) -> dict[str, Any]:
        """Wait until it has done what it was told; infos of its environments. Raises EnvironmentFailed."""
        try:
            if not self._poll.poll(self._patience):
                raise EnvironmentFailed(f"{_name(self.rows)}: {self._message}")
            answer = os.read(self._answers.fileno(), 1)
            if answer == DONE:
                return {}
            if answer == INFO:
                return self._answers.recv()
            if answer == FAILED:
                message, trace = self._answers.recv()
                error = EnvironmentFailed(message)
                error.add_note(trace)
                raise error
        except (EOFError, ConnectionResetError):
            pass
        raise self._death()

    def _death(self) -> EnvironmentFailed:
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return EnvironmentFailed(f"{_name(self.rows)}: the process {how}")

    def ask_to_close(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            os.write(self._commands.fileno(), CLOSE)

    def end(self, latest: float) -> None:
        """Wait for it until `latest`, of time.monotonic, then end it."""
        self._process.join(max(latest - time.monotonic(), 0.0))
        if self._process.is_alive():
            self._process.kill()  # an environment may hold on to SIGTERM
            self._process.join()
        self._process.close()
        self._commands.close()
        self._answers.close()


def _work(
    commands: Connection,
    answers: Connection,
    parents: Sequence[Connection],
    env_fns: Sequence[EnvFn],
    rows: slice,
    num_envs: int,
    exchanged: Dict,
    memory: Any,
    timeout: float,
) -> None:
    """The other process, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C goes to all processes of a terminal; the parent answers it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the parent's handlers
    for end in parents:
        end.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch = sys.modules.get("torch")
    if torch is not None:  # there is a core for each process, and after a fork OpenMP waits forever for threads it has not
        torch.set_num_threads(1)
    deadline = Deadline(timeout)
    group = None
    try:
        with deadline:
            group = NumberedVectorEnv(env_fns, rows.start)
        if (group.single_observation_space, group.single_action_space) != (exchanged["obs"], exchanged["action"]):
            raise EnvironmentFailed(f"{_name(rows)}: other spaces than those of environment 0")
        own = _rows(read_from_shared_memory(exchanged, memory, num_envs), rows)
        info: dict[str, Any] = {}
        while True:
            os.write(answers.fileno(), INFO if info else DONE)
            if info:
                answers.send(info)
            command = os.read(commands.fileno(), 1)
            if command == STEP:
                with deadline:
                    info = _step(group, own)
            elif command == RESET:
                seeds, options = commands.recv()
                with deadline:
                    info = _reset(group, own, (seeds[rows], options))
            else:  # CLOSE, or nothing: the parent is gone
                break
    except BaseException as error:
        named = brief(error) if isinstance(error, EnvironmentFailed) else f"{_name(rows)}: {brief(error)}"
        with contextlib.suppress(OSError):  # the parent is gone
            os.write(answers.fileno(), FAILED)
            answers.send((named, traceback.format_exc()))
    finally:
        with contextlib.suppress(BaseException):  # which this process would print, and its parent has other things to tell
            if group is not None:
                group.close()


def _end_with_parent() -> None:
    """Wait for the parent's end, then leave this process the time to close its environments, even if it hangs in a step."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(CLOSE_SECONDS)
        os._exit(1)


def _name(rows: slice) -> str:
    last = rows.stop - 1
    return f"environment {last}" if rows.start == last else f"environments {rows.start} to {last}"


def _step(group: NumberedVectorEnv, rows: Any) -> dict[str, Any]:
    """Step a group under its rows of the actions and write the rest of them; the infos that are read."""
    # an environment may keep the action it is given, and the next ones are written to where these are
    obs, reward, terminated, truncated, info = group.step(deepcopy(rows["action"]))
    _copy(rows["obs"], obs)
    rows["reward"][:], rows["terminated"][:], rows["truncated"][:] = reward, terminated, truncated
    return info


def _reset(group: NumberedVectorEnv, rows: Any, message: tuple[Sequence[int | None], dict[str, Any] | None]) -> dict[str, Any]:
    """Reset a group with (seeds, options); the infos that are read."""
    seeds, options = message
    obs, info = group.reset(seed=list(seeds[: group.num_envs]), options=options)
    _copy(rows["obs"], obs)
    return info


def _exchanged(obs: Space[Any], action: Space[Any]) -> Dict:
    """What one environment exchanges with this process in a step, as a space. Raises UsageError where no array can hold it."""
    for name, space in (("observations", obs), ("actions", action)):
        if not _has_arrays(space):
            raise UsageError(
                f"--vectorization grouped and async share arrays between processes, and none holds {name} of {space}; "
                "supported: Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"
            )
    numbers = {"reward": Box(-np.inf, np.inf, (), np.float64)}
    flags = {name: Box(0, 1, (), np.bool_) for name in ("terminated", "truncated")}  # type: ignore[arg-type]
    return Dict({"obs": obs, "action": action, **numbers, **flags})


def _allocated(space: Space[Any]) -> Space[Any]:
    """A space of the same size in memory without float16, for which gymnasium before 1.4 allocates none."""
    if isinstance(space, Dict):
        return Dict({name: _allocated(part) for name, part in space.spaces.items()})
    if isinstance(space, Tuple):
        return Tuple([_allocated(part) for part in space.spaces])
    return Box(0, 1, space.shape, np.uint16) if space.dtype == np.float16 else space


def _has_arrays(space: Space[Any]) -> bool:
    """Whether a batch of it is an array, or a dict or tuple of such."""
    if isinstance(space, Dict | Tuple):
        return all(map(_has_arrays, space.values() if isinstance(space, Dict) else space))
    return isinstance(space, Box | Discrete | MultiBinary | MultiDiscrete)


def _rows(batch: Any, rows: slice) -> Any:
    """Views of some environments' part of a batch."""
    if isinstance(batch, Mapping):
        return {name: _rows(part, rows) for name, part in batch.items()}
    return tuple(_rows(part, rows) for part in batch) if isinstance(batch, tuple) else batch[rows]


def _copy(target: Any, source: Any) -> None:
    """Write a batch into another of the same form."""
    if isinstance(target, Mapping):
        for name, part in target.items():
            _copy(part, source[name])
    elif isinstance(target, tuple):
        for part, batch in zip(target, source, strict=True):
            _copy(part, batch)
    else:
        np.copyto(target, source)
