"""How many cores this process may use, and who is tied to one."""

import os
import sys


def available_cores() -> int:
    """Those that it is bound to where the system tells (taskset, a batch system), else all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had imported fastppo.

    OpenMP's threads do not survive a fork: where the parent had used some, the first operation that is shared out among several
    waits for them forever.
    """
    return _forked


def a_thread_a_core(num_envs: int) -> dict[str, int]:
    """Arguments that tie the threads of EnvPool or ALE to cores, where they start one for each core of the machine.

    Left to itself Linux now and then runs two of them on one core while another is idle: EnvPool's HalfCheetah on two cores
    15,000 steps/s, tied 18,100; beside one busy process 11,900 and 12,400, beside two no difference (benchmarks/LOG.md). With
    fewer threads than cores, or on some of the cores only, several runs would all be tied to the same ones.
    """
    has_all = available_cores() == os.cpu_count() and sys.platform == "linux"
    return {"thread_affinity_offset": 0} if has_all and num_envs >= available_cores() else {}
