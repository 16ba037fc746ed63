"""A process that runs one group of environments: what it does from its start to its end. A part of envs/grouped.py.

It leads a process group, which is ended with it, since environments may start processes themselves. It ends when it is asked
to, when its parent has ended, and when the interpreter exits. Does not import torch.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Dict, Space
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import read_from_shared_memory

from fastppo.envs.deadline import Deadline
from fastppo.envs.numbered import EnvFn, NumberedVectorEnv
from fastppo.envs.shared_rows import reset_group, rows_of, step_group
from fastppo.envs.streams import seed_streams
from fastppo.errors import EnvironmentFailed, located
from fastppo.system.platforms import kill_group, lead_group, leave_signals_to_parent, receive_byte, send_byte

CLOSE_SECONDS = 1.0  # for closing the environments, or finishing a step, before the process is killed
PARENT_SECONDS = 0.5  # between checks that the parent is still alive

STEP, RESET, CLOSE = b"s", b"r", b"c"  # to the process
DONE, INFO, FAILED = b"d", b"i", b"f"  # from the process; a message follows the last two


class GroupTask(NamedTuple):
    """What `run_group` runs."""

    rows: slice  # of its environments
    num_envs: int  # N, of all groups
    exchanged: Dict  # what one environment exchanges in a step, as a space
    memory: Any  # shared memory for that, for all environments
    timeout: float  # seconds of its deadline
    entropy: Sequence[int]  # for its global generators, until a reset with a seed
    copied: frozenset[int]  # ids of spaces that the fork has copied with their generators, such as attributes of a class
    mode: AutoresetMode
    info_names: Sequence[str]  # as NumberedVectorEnv takes them
    first: int = 0  # number of environment 0, for messages

    @property
    def numbers(self) -> slice:
        """The numbers of its environments."""
        return slice(self.first + self.rows.start, self.first + self.rows.stop)


def run_group(
    commands: Connection, answers: Connection, parents: Sequence[Connection], env_fns: Sequence[EnvFn], task: GroupTask
) -> None:
    """Make the environments, then answer commands until CLOSE, the parent's end or an error.

    parents: the parent's ends of pipes that a fork has copied, to be closed.
    """
    rows, exchanged = task.rows, task.exchanged
    lead_group()  # processes that environments start are killed with this one
    leave_signals_to_parent()
    for end in parents:
        end.close()
    seed_streams(task.entropy)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch = sys.modules.get("torch")
    if torch is not None:  # each process has one core, and after a fork OpenMP would wait forever for its threads
        torch.set_num_threads(1)
    deadline = Deadline(task.timeout)
    group = None
    try:
        with deadline:
            group = NumberedVectorEnv(env_fns, task.numbers.start, task.mode, task.info_names)
        if (group.single_observation_space, group.single_action_space) != (exchanged["obs"], exchanged["action"]):
            raise EnvironmentFailed(f"{group_name(task.numbers)}: other spaces than those of environment {task.first}")
        for identity, space in spaces_of(group).items():
            if identity in task.copied:  # else its samples would equal those of other processes
                of_space = np.random.SeedSequence([int(space.np_random.integers(2**32)), task.numbers.start])
                space.seed(int(of_space.generate_state(1)[0]))
        own = rows_of(read_from_shared_memory(exchanged, task.memory, task.num_envs), rows)
        info: dict[str, Any] = {}
        while True:
            send_byte(answers, INFO if info else DONE)
            if info:
                answers.send(info)
            command = receive_byte(commands)
            if command == STEP:
                with deadline:
                    info = step_group(group, own)
            elif command == RESET:
                seeds, options = commands.recv()
                if seeds[rows.start] is not None:
                    seed_streams(int(seeds[rows.start]))
                with deadline:
                    info = reset_group(group, own, (seeds[rows], options))
            else:  # CLOSE, or nothing: the parent has ended
                break
    except BaseException as error:
        named = str(error) if isinstance(error, EnvironmentFailed) else f"{group_name(task.numbers)}: {located(error)}"
        with contextlib.suppress(OSError):  # the parent has ended
            send_byte(answers, FAILED)
            answers.send((named, traceback.format_exc()))
    finally:
        with contextlib.suppress(BaseException):  # this process would print the error over the parent's output
            if group is not None:
                group.close()


def _end_with_parent() -> None:
    """Wait for the parent's end, give this process CLOSE_SECONDS to close its environments, then kill it.

    The end of a pipe is not enough: processes that an environment has started may hold copies of its other end.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while parent.is_alive() and (os.name == "nt" or os.getppid() == parent.pid):
        parent.join(PARENT_SECONDS)
    time.sleep(CLOSE_SECONDS)
    kill_group(0)  # with what its environments have started
    os._exit(1)


def spaces_of(group: NumberedVectorEnv) -> dict[int, Space[Any]]:
    """The spaces of the environments inside their wrappers, by the ids of the spaces."""
    spaces = [space for env in group.envs for space in (env.unwrapped.observation_space, env.unwrapped.action_space)]
    return {id(space): space for space in spaces}


def group_name(rows: slice) -> str:
    """The numbers of the environments `rows`, for messages."""
    last = rows.stop - 1
    return f"environment {last}" if rows.start == last else f"environments {rows.start} to {last}"
