"""In one process or several, for environments without a vector entry point of their own: decided by short trials.

One copy of the environment says how long a step takes and whether it computes or waits (envs/check.py). Where processes promise
to be faster, the environments of the run are made in them and stepped: if they are, they are those that train. Costs no torch.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gymnasium.vector import VectorEnv

from fastppo.envs.atari import is_atari
from fastppo.envs.check import Tried, try_copy
from fastppo.envs.check_ends import leaves
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.make import default_vectorization, make_vec, num_processes
from fastppo.envs.streams import untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, ForkHangs
from fastppo.random_streams import Stream, environment_seed, seed_of

PROBE_STEPS = 50
PROBE_SECONDS = 0.5
# Steps shorter than this have nothing to win in other processes, and no process is started to find out. Handing over to two
# groups and back takes 55 to 75 us (benchmarks/LOG.md), and half of such a step saves as much; to more processes than there are
# cores it takes longer (gymnasium's AsyncVectorEnv 570 us for eight CartPoles on two), and is better only for environments that
# wait, for another program say.
GROUPED_FROM = 150e-6
ASYNC_FROM = 5e-3
WAITS_BELOW = 0.5  # a step that computes for a smaller share of its time
BETTER = 0.9  # of the time in one process, at most, to be worth more processes
ALIKE_RESETS = 4  # after which environments of two processes that still start alike have copies of one generator


class Choice(NamedTuple):
    """A vectorization, why that one, and the environments of the run where they have been made to find out."""

    vectorization: str
    why: str
    envs: VectorEnv | None = None


def choose_vectorization(
    env_id: str,
    num_envs: int,
    wanted: str,
    env_kwargs: Mapping[str, Any],
    num_threads: int | None = None,
    deadline: Deadline = NO_DEADLINE,
    tried: Callable[[], Tried] | None = None,
) -> Choice:
    """What "auto" means for this environment on this machine.

    Args:
        tried: what came of trying a copy, asked for where there is a choice; default: one is made for it.

    Returns:
        "entry-point", "sync", "grouped" or "async" (`wanted` itself unless that is "auto"), and the reason in a few words.

    Raises:
        UsageError: as `make_vec`.
    """
    if wanted != "auto":
        return Choice(wanted, "as --vectorization asks")
    if is_atari(env_id):
        return Choice("entry-point", "ALE's own vector environment")
    if default_vectorization(env_id) == "entry-point":
        return Choice("entry-point", "the environment's own vector class")
    if num_envs == 1:
        return Choice("sync", "one environment")
    num_groups = num_processes(num_envs, num_threads)
    if num_groups == 1:
        return Choice("sync", "one core")
    copy = try_copy(env_id, env_kwargs, num_envs, deadline) if tried is None else tried()
    sync = num_envs * copy.step_seconds
    if sync == float("inf"):
        return Choice("sync", "a trial step failed")
    if sync < GROUPED_FROM:
        return Choice("sync", f"a step takes {sync * 1e3:.2f} ms, too little to share out")
    waits = sync >= ASYNC_FROM and copy.computing < WAITS_BELOW
    vectorization, count = ("async", num_envs) if waits else ("grouped", num_groups)
    told = f"a step takes {sync * 1e3:.2f} ms in one process"
    envs: VectorEnv | None = None
    try:
        envs, _ = make_vec(env_id, num_envs, vectorization, env_kwargs, num_threads, deadline, is_trial=True)
        with untouched_streams():
            same = start_alike(envs, -(-num_envs // count), copy.varies, deadline)
            taken = step_seconds(envs, deadline)
    except ENVIRONMENT_ERRORS as error:  # one that fails here fails in training too, where it is reported
        _close(envs, deadline)
        hangs = isinstance(error, ForkHangs) or isinstance(error.__context__, ForkHangs)
        how = "hang: a fork has none of the threads that the environment's module has started" if hangs else "failed"
        return Choice("sync", f"{told}; those of a trial in {count} {how}")
    told += f", {taken * 1e3:.2f} ms in {count}"
    if same or taken >= BETTER * sync:
        _close(envs, deadline)
        told += ", where they start alike: the environment's module has a random generator" if same else ""
        return Choice("sync", told)
    return Choice(vectorization, told, envs)


def start_alike(envs: VectorEnv, size: int, varies: bool, deadline: Deadline = NO_DEADLINE) -> bool:
    """Reset `envs`; whether those in a second process start as the first `size` do, though an environment's starts vary.

    They do in every reset where a generator of the environment's module was copied by the fork, and no reset seeds it.
    """
    space, number = envs.single_observation_space, min(size, envs.num_envs - size)
    for seed in range(ALIKE_RESETS):
        with deadline:
            obs, _ = envs.reset(seed=environment_seed(seed, Stream.PROBE_ENVIRONMENTS))
        if not varies or not all((leaf[:number] == leaf[size : size + number]).all() for leaf in leaves(obs, space)):
            return False
    return True


def step_seconds(envs: VectorEnv, deadline: Deadline = NO_DEADLINE) -> float:
    """Seconds of one step under random actions, at most PROBE_STEPS of them; raises what an environment does."""
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
