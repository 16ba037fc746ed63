"""N environments in K groups, a process for each group: `--vectorization grouped` (a group a core) and `async` (K = N).

For environments that are slow in Python. A process for each environment costs more than it gives where there are fewer cores
than environments: with gymnasium's AsyncVectorEnv eight HalfCheetahs on two cores step in 1165 us, in one process in 585, in
two groups in 348 us (benchmarks/LOG.md). The first group runs in this process, which would only wait otherwise; not in that of
a half (envs/halves.py), whose caller has other work between `step_async` and `step_wait`. Groups exchange arrays in shared
memory (envs/shared_rows.py); a byte in a pipe says start and done (8 us for both; through a socket 13, and spinning before
blocking keeps a core busy to save 4).

An environment that raises, exits or hangs is named by its number, in any process. Where its process was killed or hangs in C,
the numbers of its group are named. Same seed, same bits as gymnasium's SyncVectorEnv, for any number of groups. An environment
that draws from a global generator is the exception: each process has its own (envs/streams.py).

This module is the parent's side, envs/group_process.py the other one. Knows nothing of policies. Does not import torch.
"""

import contextlib
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space, create_shared_memory, read_from_shared_memory

from fastppo.envs.deadline import LATE, NO_DEADLINE, Deadline
from fastppo.envs.group_process import (
    CLOSE,
    CLOSE_SECONDS,
    DONE,
    FAILED,
    INFO,
    RESET,
    STEP,
    GroupTask,
    group_name,
    run_group,
    spaces_of,
)
from fastppo.envs.numbered import SUCCESS, EnvFn, NumberedVectorEnv
from fastppo.envs.shared_rows import allocated_space, copy_into, exchanged_space, reset_group, rows_of, step_group
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, ForkHangs, UsageError, brief
from fastppo.system.platforms import START_METHOD, interrupts_held, kill_group, poller, receive_byte, send_byte

NAME_SECONDS = 1.0  # beyond the deadline, for a process to say which environment exceeded its own deadline
# A forked process has none of its parent's threads, and waits forever for a thread pool that it inherited. A process is taken
# to wait like that if it has not answered for HANG_SECONDS, or SLOWER times as long as this process took, and is not computing.
# That is tested while it makes the environments, in the first reset and in the first step: all processes take about as long.
HANG_SECONDS, TRIAL_HANG_SECONDS, SLOWER = 10.0, 2.0, 20.0
TRIAL_SECONDS = 10.0  # for each of these three in a trial, computing or not
UNGUARDED = 86  # exit code of a process that finds the user's script without a main guard


class GroupedVectorEnv(VectorEnv[Any, Any, Any]):
    """N environments in K groups of nearly equal size, one of them in this process and K - 1 in processes of their own.

    Returned arrays are reused in the next step, so copy what you keep: observations (N, ...), rewards (N,) float64, terminated
    and truncated (N,) bool. Autoreset and infos are those of NumberedVectorEnv. Actions are
    cast to the dtype of the space. An environment that fails ends all processes before the error is raised, and later calls
    raise the same error.
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        num_groups: int,
        deadline: Deadline = NO_DEADLINE,
        is_trial: bool = False,
        mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        info_names: Sequence[str] = (SUCCESS,),
        first: int | None = None,
    ) -> None:
        """Make the environments, each where it will run; env_fns[0] says which spaces all of them have.

        Args:
            env_fns: N functions that make one environment each.
            num_groups: K, at most N.
            deadline: the caller's, for steps and resets. Each other process has one of as many seconds; a process that exceeds
                it by NAME_SECONDS is ended.
            is_trial: a trial of processes waits less long for those that hang.
            info_names: as NumberedVectorEnv takes them.
            first: the number of env_fns[0], for environments that run all in other processes; None: the first group runs in
                this one.

        Raises:
            UsageError: a space that arrays cannot hold, or a script without a main guard where processes import it.
            EnvironmentFailed: an environment of another process could not be made.
            Exception: whatever making one in this process raises.
        """
        self.num_envs = len(env_fns)
        edges = [-(-group * self.num_envs // num_groups) for group in range(num_groups + 1)]  # the larger groups first
        self._workers: list[GroupProcess] = []
        self._failure: BaseException | None = None
        self._deadline = deadline
        self._is_trial = is_trial
        self._answered: set[bytes] = set()  # the commands that all processes have answered at least once
        if getattr(multiprocessing.current_process(), "_inheriting", False):  # started here, it imports the user's script
            os._exit(UNGUARDED)
        own = edges[1] if first is None else 0  # environments in this process
        began = time.monotonic()
        self._group = NumberedVectorEnv(env_fns[: own or 1], first or 0, mode, info_names)
        if not own:  # it was made for its spaces
            self._group.close()
        own_seconds = time.monotonic() - began
        deadline.lift()  # the rest waits for processes with deadlines of their own
        self.metadata = {**self._group.metadata, "autoreset_mode": mode}
        self.render_mode = self._group.render_mode
        self.single_observation_space = self._group.single_observation_space
        self.single_action_space = self._group.single_action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        try:
            exchanged = exchanged_space(self.single_observation_space, self.single_action_space)
            context = multiprocessing.get_context(START_METHOD)
            memory = create_shared_memory(allocated_space(exchanged), self.num_envs, context)  # type: ignore[arg-type]
            self._batch: Any = read_from_shared_memory(exchanged, memory, self.num_envs)
            self._rows = rows_of(self._batch, slice(0, own)) if own else None
            for start, stop in pairwise(edges[1:] if own else edges):
                rows, copied, number = slice(start, stop), frozenset(spaces_of(self._group)), first or 0
                seconds, entropy = deadline.seconds, _entropy(number + start)
                task = GroupTask(rows, self.num_envs, exchanged, memory, seconds, entropy, copied, mode, info_names, number)
                self._workers.append(GroupProcess(context, env_fns, task, self._workers, deadline))
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
        message = seeds, options
        self._send(RESET, message)
        info = self._result(RESET, partial(reset_group, self._group, self._rows, message))
        return self._batch["obs"], info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions (N, ...) -> obs (N, ...), reward, terminated, truncated (N,), info."""
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Any) -> None:
        """Begin a step in the other processes; actions: (N, ...)."""
        copy_into(self._batch["action"], actions)
        self._send(STEP)

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step this process's group, and wait for the others: what `step` returns."""
        info = self._result(STEP, partial(step_group, self._group, self._rows))
        batch = self._batch
        return batch["obs"], batch["reward"], batch["terminated"], batch["truncated"], info

    def _send(self, command: bytes, message: Any = None) -> None:
        """Send one command to the other processes. After any error the environments are closed."""
        if self._failure is not None:
            raise self._failure
        if self.closed:
            raise gym.error.ClosedEnvironmentError("these environments have been closed")
        with self._closing_on_error():
            for worker in self._workers:
                worker.send(command, message)

    def _result(self, command: bytes, own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The infos of all groups once a command is done; `own` runs it in this process's group. Errors: as `_send`."""
        with self._closing_on_error():
            began = time.monotonic()
            infos = [] if self._rows is None else [own()]
            own_seconds = time.monotonic() - began
            self._deadline.lift()
            if command in self._answered:
                infos += [worker.result() for worker in self._workers]
            else:
                infos += [worker.first_result(own_seconds, self._is_trial) for worker in self._workers]
                self._answered.add(command)
        return self._join(infos) if any(infos) else {}

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._failure = error if isinstance(error, ENVIRONMENT_ERRORS) else None
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Close after an error. Errors while closing are dropped, since the first error is the one to report."""
        with contextlib.suppress(*ENVIRONMENT_ERRORS):
            self.close()
        self.closed = True

    def _join(self, infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join the groups' infos as SyncVectorEnv would: 0 or None, and False under _key, where a group lacks the key."""
        joined: dict[str, Any] = {}
        own = [] if self._rows is None else [self._group.num_envs]
        sizes = [*own, *(worker.num_envs for worker in self._workers)]
        for key in dict.fromkeys(key for info in infos for key in info):
            like = next(info[key] for info in infos if key in info)
            missing = None if like.dtype == object else 0
            parts = [
                info[key] if key in info else np.full((size, *like.shape[1:]), missing, like.dtype)
                for info, size in zip(infos, sizes, strict=True)
            ]
            joined[key] = np.concatenate(parts)
        return joined

    def close_extras(self, **kwargs: Any) -> None:
        """Close all environments. A process that has not ended after CLOSE_SECONDS, in a step that hangs too, is killed."""
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


class GroupProcess:
    """The parent's handle of a process that runs a group of environments."""

    def __init__(
        self,
        context: BaseContext,
        env_fns: Sequence[EnvFn],
        task: GroupTask,
        earlier: "Sequence[GroupProcess]",
        deadline: Deadline,
    ) -> None:
        """Start the process of a task; `first_result` then raises if its environments could not be made.

        task: `copied` has the spaces of environments in this process, by their ids.
        """
        rows = task.rows
        self.numbers, self.num_envs = task.numbers, rows.stop - rows.start
        commands, self._commands = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        self._message, self._poll = deadline.message, poller(self._answers)
        self._is_forked = context.get_start_method() == "fork"
        self._seconds = min(deadline.seconds + NAME_SECONDS, 2e6) if deadline.seconds else math.inf  # to wait for an answer
        self._patience = self._seconds * 1e3 if deadline.seconds else None  # the same in ms, of 31 bits
        # A forked process has copies of these ends and closes them: it notices its parent's end by the end of a pipe that no
        # other process can write to.
        parents = [end for worker in (*earlier, self) for end in (worker._commands, worker._answers)] if self._is_forked else []
        wrapped = [CloudpickleWrapper(env_fn) for env_fn in env_fns[rows]]
        task = task if self._is_forked else task._replace(copied=frozenset())
        self._process = context.Process(  # type: ignore[attr-defined]
            target=run_group,
            args=(commands, answers, parents, wrapped, task),
            name=f"fastppo-environments-{task.numbers.start}",
            daemon=False,  # environments may start processes of their own
        )
        try:
            with interrupts_held():
                self._process.start()
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise UsageError(
                "--vectorization grouped and async start processes, to which its function or --env-kwargs cannot be sent: "
                f"{brief(error)}; use --vectorization sync"
            ) from None
        # runs before multiprocessing waits for the process at the interpreter's exit
        self._at_exit = util.Finalize(self, _end, (self._process, self._commands), exitpriority=100)
        commands.close()  # only the other process has these ends now, so the pipe of answers ends with it
        answers.close()

    def send(self, command: bytes, message: Any = None) -> None:
        """Send a command and its message; raises EnvironmentFailed if the process has ended."""
        try:
            send_byte(self._commands, command)
            if message is not None:
                self._commands.send(message)
        except BrokenPipeError:
            raise self._death() from None

    def result(self) -> dict[str, Any]:
        """Wait until the command is done; returns the infos of its environments. Raises EnvironmentFailed."""
        try:
            began = time.monotonic()
            while not self._poll(self._patience):
                if time.monotonic() - began < self._seconds + LATE:
                    raise EnvironmentFailed(f"{group_name(self.numbers)}: {self._message}")
                began = time.monotonic()  # this process was stopped meanwhile, and so may the other one have been
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
        """`result` of a command's first run, which took this process `own_seconds`; also raises ForkHangs."""
        idle = max(TRIAL_HANG_SECONDS if is_trial else HANG_SECONDS, SLOWER * own_seconds)
        most = max(TRIAL_SECONDS, SLOWER * own_seconds) if is_trial else math.inf
        started, waited = time.monotonic(), 0.0
        before: int | None = None
        while self._is_forked and waited + idle < self._seconds and not self._poll(idle * 1e3 / 2):
            waited, now = time.monotonic() - started, _computed(self._process.pid)
            if waited > most or (now is not None and now == before):
                raise ForkHangs(
                    f"{group_name(self.numbers)}: no answer for {waited:.0f} s: a forked process lacks its parent's threads, "
                    "such as a thread pool of the environment's module; use --vectorization sync"
                )
            before = now
        return self.result()

    def _death(self) -> Exception:
        """The error to raise after the process has ended by itself."""
        self._process.join(CLOSE_SECONDS)
        code = self._process.exitcode
        if code == UNGUARDED:
            return UsageError(
                "--vectorization grouped and async start processes, which import your script: put what it does under "
                'if __name__ == "__main__":, or use --vectorization sync'
            )
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        return EnvironmentFailed(f"{group_name(self.numbers)}: the process {how}")

    def ask_to_close(self) -> None:
        """Send the command to close, if the process is still there."""
        with contextlib.suppress(OSError):  # gone already
            send_byte(self._commands, CLOSE)

    def end(self, latest: float) -> None:
        """Wait for it until `latest`, of time.monotonic, then kill it and the processes that its environments have started."""
        self._at_exit.cancel()
        _end(self._process, None, latest)
        self._process.close()
        self._commands.close()
        self._answers.close()


def _end(process: Any, commands: Connection | None, latest: float | None = None) -> None:
    """End a process and its process group: ask it through `commands`, wait until `latest`, then kill."""
    if commands is not None:
        with contextlib.suppress(OSError):
            send_byte(commands, CLOSE)
    process.join(CLOSE_SECONDS if latest is None else max(latest - time.monotonic(), 0.0))
    if process.is_alive():
        process.kill()  # an environment may ignore SIGTERM
    if process.pid is not None:
        kill_group(process.pid)
    process.join()


def _computed(group: int | None) -> int | None:
    """Ticks of CPU time of a process group; None where one of its processes is running, or the system does not say."""
    total = None
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, *fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            if int(fields[1]) == group:
                if state in "RD":
                    return None
                total = (total or 0) + int(fields[10]) + int(fields[11])
    return total


def _entropy(number: int) -> list[int]:
    """Entropy of a process's random streams until its first reset; the same in every run if the user has seeded numpy.

    number: of its first environment.
    """
    _, keys, position, *_ = np.random.get_state(legacy=True)
    return [number, int(position), *map(int, keys[:4])]
