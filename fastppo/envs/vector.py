"""N environments in K groups, each in a process of its own: `--vectorization sync` (K = 1), `grouped` and `async` (K = N).

For environments that are slow in Python, `grouped` has as many groups as cores. A process each costs more than it gives where
there are fewer cores than environments: by gymnasium's AsyncVectorEnv eight HalfCheetahs on two cores step in 1165 us, and in
585 in one process. Two groups, each a loop over its own, take 348 us (benchmarks/LOG.md). The first group is this process's,
which would only wait otherwise; what they exchange lies in shared memory, and a byte in a pipe says go and done (8 us for both;
through a socket 13, and spinning before blocking keeps a core busy to save 4).

An environment that raises, exits or hangs is named by its number, whichever process it is in; where its process was killed, or
hangs in C, by the numbers of its group. Same seed, same bits as gymnasium's SyncVectorEnv, whatever the number of groups. An
environment that draws from a global generator is the exception: each process has its own (envs/streams.py).

Environments may start processes themselves. Each of our processes leads a process group, which is ended with it. It ends when
it is told to, when its parent is gone, and when the interpreter exits. Knows nothing of policies, costs no torch.
"""

import contextlib
import math
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Space, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space, create_shared_memory, read_from_shared_memory

from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.masks import masks_of, owner_of
from fastppo.envs.streams import seed_streams
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, ForkHangs, NoAnswer, UsageError, located
from fastppo.system.platforms import (
    START_METHOD,
    interrupts_held,
    kill_group,
    lead_group,
    leave_signals_to_parent,
    poller,
    receive_byte,
    send_byte,
)

EnvFn = Callable[[], gym.Env[Any, Any]]

# The infos that are read (envs/autoreset.py). Others stay where they are: gathering HalfCheetah's takes a seventh of a step.
INFO_KEYS = ("action_mask",)
CLOSE_SECONDS = 1.0  # that processes have for closing their environments, or finishing a step, before they are ended
NAME_SECONDS = 1.0  # that a process has beyond the deadline, its own too, for saying which environment let it pass
PARENT_SECONDS = 0.5  # between looks whether the parent is still there
# A forked process has none of its parent's threads, and waits forever for a thread pool that it inherited. That is assumed of
# one that has not answered for so long, or SLOWER times as long as this process took, and is not computing: in being made, the
# first reset and the first step, which are about as long for all environments.
HANG_SECONDS, TRIAL_HANG_SECONDS, SLOWER = 10.0, 2.0, 20.0
TRIAL_SECONDS = 10.0  # for each of these three in a trial, computing or not
UNGUARDED = 86  # exit code of a process that finds its parent's script without a main guard

STEP, RESET, CLOSE = b"s", b"r", b"c"  # to a worker
DONE, INFO, FAILED = b"d", b"i", b"f"  # from a worker; the last two are followed by a message


class NumberedVectorEnv(SyncVectorEnv):  # before gymnasium 1.4 it takes no type arguments
    """Environments first, first + 1, ... in this process: gymnasium's, but it names the one that fails, and copies less.

    Returned observations are reused between steps: copy what is to be kept. Of infos, only INFO_KEYS are returned.
    """

    def __init__(self, env_fns: Sequence[EnvFn], first: int = 0) -> None:
        """Make the environments; `first` is the number of env_fns[0]. Raises whatever making one does, the others closed."""
        made: list[_Numbered] = []

        def make(env_fn: EnvFn, number: int) -> _Numbered:
            made.append(_Numbered.make(env_fn, number))
            return made[-1]

        try:
            super().__init__([partial(make, env_fn, first + i) for i, env_fn in enumerate(env_fns)], copy=False)
        except BaseException:
            for env in made:
                with contextlib.suppress(*ENVIRONMENT_ERRORS):
                    env.close()
            raise

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        read = {key: env_info[key] for key in INFO_KEYS if key in env_info}
        return super()._add_info(vector_infos, read, env_num) if read else vector_infos

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments, once: gymnasium before 1.4 tries again, and prints what is raised, when this is collected."""
        self.closed = True
        super().close_extras(**kwargs)


class _Numbered(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that says its number when it fails, and in its info what `action_masks()` says (envs/masks.py)."""

    def __init__(self, env: gym.Env[Any, Any], number: int) -> None:
        super().__init__(env)
        self.metadata = dict(env.metadata)  # before gymnasium 1.4 SyncVectorEnv writes to it, and it is its class's
        self.number = number
        self._masks = owner_of(env)  # None: not asked

    @classmethod
    def make(cls, env_fn: EnvFn, number: int) -> "_Numbered":
        try:
            return cls(env_fn(), number)
        except NoAnswer as error:  # what it raises says by its type which flag is wrong
            raise EnvironmentFailed(f"environment {number}: {located(error)}") from error

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            obs, info = self.env.reset(**kwargs)
            return obs, info if self._masks is None else self._with_mask(info)
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {located(error)}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            if self._masks is None:
                return self.env.step(action)
            obs, reward, terminated, truncated, info = self.env.step(action)
            # nobody acts on an episode's last observation, and there may be nothing legal in it
            info = info if terminated or truncated else self._with_mask(info)
            return obs, reward, terminated, truncated, info
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {located(error)}") from error

    def _with_mask(self, info: dict[str, Any]) -> dict[str, Any]:
        if info.get("action_mask") is not None:
            return info
        mask = masks_of(self._masks)
        return info if mask is None else {**info, "action_mask": mask}


class GroupedVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments in K groups of nearly equal size, one of them in this process and K - 1 in processes of their own.

    Returned observations, (N, ...), are one batch for all groups, reused between steps as rewards (N,) float64, terminated and
    truncated (N,) bool are: copy what is to be kept. Resets on the next step, as SyncVectorEnv; of infos, only INFO_KEYS are
    returned. Actions are cast to the dtype of the space. An environment that fails ends all: the processes are gone when the
    error arrives, which arrives again should anybody go on.
    """

    def __init__(
        self, env_fns: Sequence[EnvFn], num_groups: int, deadline: Deadline = NO_DEADLINE, is_trial: bool = False
    ) -> None:
        """Make the environments, each where it will run; env_fns[0] says which spaces all of them have.

        Args:
            env_fns: N functions that make one environment each.
            num_groups: K, at most N.
            deadline: the one that steps and resets are called under. Other processes have one of as many seconds, and when one
                of them lets even that pass it is given up.
            is_trial: whether these processes are any good; less patience for those that hang.

        Raises:
            UsageError: a space that arrays cannot hold, or a script without a main guard where processes import it.
            EnvironmentFailed: an environment of another process could not be made.
            Exception: whatever making one in this process raised.
        """
        self.num_envs = len(env_fns)
        edges = [-(-group * self.num_envs // num_groups) for group in range(num_groups + 1)]  # the larger groups first
        self._workers: list[_Worker] = []
        self._failure: BaseException | None = None
        self._deadline = deadline
        self._is_trial = is_trial
        self._answered: set[bytes] = set()  # the commands that all processes have answered at least once
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # a process of ours that imports the user's script
            os._exit(UNGUARDED)
        began = time.monotonic()
        self._group = NumberedVectorEnv(env_fns[: edges[1]])
        own_seconds = time.monotonic() - began
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
                rows, shared = slice(start, stop), _spaces_of(self._group)
                self._workers.append(_Worker(context, env_fns, rows, exchanged, memory, self._workers, deadline, shared))
            for worker in self._workers:
                worker.first_result(own_seconds, is_trial)
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
            if command in self._answered:
                infos = [own() if message is None else own(message)]
                self._deadline.lift()
                infos += [worker.result() for worker in self._workers]
            else:
                began = time.monotonic()
                infos = [own() if message is None else own(message)]
                own_seconds = time.monotonic() - began
                self._deadline.lift()
                infos += [worker.first_result(own_seconds, self._is_trial) for worker in self._workers]
                self._answered.add(command)
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
        shared: Mapping[int, Space[Any]],
    ) -> None:
        """Start it on environments `rows`; `result` then says whether they could be made.

        shared: by their ids the spaces of environments that there are already, as `_spaces_of` returns them.
        """
        self.rows, self.num_envs = rows, rows.stop - rows.start
        commands, self._commands = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        self._message, self._poll = deadline.message, poller(self._answers)
        self._is_forked = context.get_start_method() == "fork"
        self._patience = min(deadline.seconds + NAME_SECONDS, 2e6) * 1e3 if deadline.seconds else None  # ms, of 31 bits
        # A forked process has copies of these ends, and closes them: that its parent is gone it notices by the end of a pipe
        # that nobody else can write to.
        parents = [end for worker in (*earlier, self) for end in (worker._commands, worker._answers)] if self._is_forked else []
        wrapped = [CloudpickleWrapper(env_fn) for env_fn in env_fns[rows]]
        copied = frozenset(shared) if self._is_forked else frozenset[int]()
        share = _Share(rows, len(env_fns), exchanged, memory, deadline.seconds, _entropy(rows), copied)
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_work,
            args=(commands, answers, parents, wrapped, share),
            name=f"fastppo-environments-{rows.start}",
            daemon=False,  # environments may start processes of their own
        )
        with interrupts_held():
            self._process.start()
        # before multiprocessing waits for it at the interpreter's exit
        self._at_exit = util.Finalize(self, _end, (self._process, self._commands), exitpriority=100)
        commands.close()  # the other process has them now: its end is noticed by the end of the pipe of answers
        answers.close()

    def send(self, command: bytes, message: Any = None) -> None:
        """Raises EnvironmentFailed where the process is gone."""
        try:
            send_byte(self._commands, command)
            if message is not None:
                self._commands.send(message)
        except BrokenPipeError:
            raise self._death() from None

    def result(self) -> dict[str, Any]:
        """Wait until it has done what it was told; infos of its environments. Raises EnvironmentFailed."""
        try:
            if not self._poll(self._patience):
                raise EnvironmentFailed(f"{_name(self.rows)}: {self._message}")
            answer = receive_byte(self._answers)
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

    def first_result(self, own_seconds: float, is_trial: bool) -> dict[str, Any]:
        """`result` of something done for the first time, which took this process `own_seconds`; also raises ForkHangs."""
        idle = max(TRIAL_HANG_SECONDS if is_trial else HANG_SECONDS, SLOWER * own_seconds)
        most = max(TRIAL_SECONDS, SLOWER * own_seconds) if is_trial else math.inf
        patience = math.inf if self._patience is None else self._patience / 1e3
        started, waited = time.monotonic(), 0.0
        before: int | None = None
        while self._is_forked and waited + idle < patience and not self._poll(idle * 1e3 / 2):
            waited, now = time.monotonic() - started, _computed(self._process.pid)
            if waited > most or (now is not None and now == before):
                raise ForkHangs(
                    f"{_name(self.rows)}: no answer for {waited:.0f} s: a forked process lacks its parent's threads, such as a "
                    "thread pool of the environment's module; use --vectorization sync"
                )
            before = now
        return self.result()

    def _death(self) -> Exception:
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        if code == UNGUARDED:
            return UsageError(
                "--vectorization grouped and async start processes, which import your script: put what it does under "
                'if __name__ == "__main__":, or use --vectorization sync'
            )
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return EnvironmentFailed(f"{_name(self.rows)}: the process {how}")

    def ask_to_close(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            send_byte(self._commands, CLOSE)

    def end(self, latest: float) -> None:
        """Wait for it until `latest`, of time.monotonic, then end it, and what its environments have left running."""
        self._at_exit.cancel()
        _end(self._process, None, latest)
        self._process.close()
        self._commands.close()
        self._answers.close()


def _end(process: Any, commands: Connection | None, latest: float | None = None) -> None:
    """End another process: by asking through `commands` first, then, after `latest`, by force; and all of its group."""
    if commands is not None:
        with contextlib.suppress(OSError):
            send_byte(commands, CLOSE)
    process.join(CLOSE_SECONDS if latest is None else max(latest - time.monotonic(), 0.0))
    if process.is_alive():
        process.kill()  # an environment may hold on to SIGTERM
    if process.pid is not None:
        kill_group(process.pid)
    process.join()


def _computed(group: int | None) -> int | None:
    """Ticks that the processes of a group have computed; None where one of them is at it, or the system does not tell."""
    total = None
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, *fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[1]) == group:
                if state in "RD":
                    return None
                total = (total or 0) + int(fields[10]) + int(fields[11])
    return total


def _entropy(rows: slice) -> list[int]:
    """Of a process's streams before its first reset: repeatable where the user has seeded numpy's, else of this run alone."""
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return [rows.start, int(position), *map(int, keys[:4])]


class _Share(NamedTuple):
    """What another process has to do."""

    rows: slice  # of its environments
    num_envs: int  # of all
    exchanged: Dict  # what an environment exchanges in a step, as a space
    memory: Any  # where that lies, for all environments
    timeout: float  # seconds of its deadline
    entropy: Sequence[int]  # of its global generators, until a reset with a seed
    copied: frozenset[int]  # ids of spaces that the fork has copied with their generators, of a class for instance


def _work(
    commands: Connection, answers: Connection, parents: Sequence[Connection], env_fns: Sequence[EnvFn], share: _Share
) -> None:
    """The other process, from its start to its end."""
    rows, exchanged = share.rows, share.exchanged
    lead_group()  # what its environments start is ended with it
    leave_signals_to_parent()
    for end in parents:
        end.close()
    seed_streams(share.entropy)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch = sys.modules.get("torch")
    if torch is not None:  # there is a core for each process, and after a fork OpenMP waits forever for threads it has not
        torch.set_num_threads(1)
    deadline = Deadline(share.timeout)
    group = None
    try:
        with deadline:
            group = NumberedVectorEnv(env_fns, rows.start)
        if (group.single_observation_space, group.single_action_space) != (exchanged["obs"], exchanged["action"]):
            raise EnvironmentFailed(f"{_name(rows)}: other spaces than those of environment 0")
        for identity, space in _spaces_of(group).items():
            if identity in share.copied:  # else its samples would be those of other processes
                of_space = np.random.SeedSequence([int(space.np_random.integers(2**32)), rows.start])
                space.seed(int(of_space.generate_state(1)[0]))
        own = _rows(read_from_shared_memory(exchanged, share.memory, share.num_envs), rows)
        info: dict[str, Any] = {}
        while True:
            send_byte(answers, INFO if info else DONE)
            if info:
                answers.send(info)
            command = receive_byte(commands)
            if command == STEP:
                with deadline:
                    info = _step(group, own)
            elif command == RESET:
                seeds, options = commands.recv()
                if seeds[rows.start] is not None:
                    seed_streams(int(seeds[rows.start]))
                with deadline:
                    info = _reset(group, own, (seeds[rows], options))
            else:  # CLOSE, or nothing: the parent is gone
                break
    except BaseException as error:
        named = str(error) if isinstance(error, EnvironmentFailed) else f"{_name(rows)}: {located(error)}"
        with contextlib.suppress(OSError):  # the parent is gone
            send_byte(answers, FAILED)
            answers.send((named, traceback.format_exc()))
    finally:
        with contextlib.suppress(BaseException):  # which this process would print, and its parent has other things to tell
            if group is not None:
                group.close()


def _end_with_parent() -> None:
    """Wait for the parent's end, then leave this process the time to close its environments, even if it hangs in a step.

    Not by the end of a pipe alone: processes that an environment has started may hold copies of its other end.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while parent.is_alive() and (os.name == "nt" or os.getppid() == parent.pid):
        parent.join(PARENT_SECONDS)
    time.sleep(CLOSE_SECONDS)
    kill_group(0)  # with what its environments have started
    os._exit(1)


def _spaces_of(group: NumberedVectorEnv) -> dict[int, Space[Any]]:
    """The spaces of environments themselves, without wrappers, by their ids."""
    spaces = [space for env in group.envs for space in (env.unwrapped.observation_space, env.unwrapped.action_space)]
    return {id(space): space for space in spaces}


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
