"""In one process or several, for environments without a vector entry point of their own: decided by short trials.

Costs no torch.
"""

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from gymnasium.vector import VectorEnv

from fastppo.envs.atari import is_atari
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.make import default_vectorization, make_vec, num_processes
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError
from fastppo.random_streams import Stream, environment_seed, seed_of

PROBE_STEPS = 50
PROBE_SECONDS = 0.5
# Steps shorter than this have nothing to win in other processes, and no process is started to find out. Handing over to two
# groups and back takes 55 to 75 us (benchmarks/LOG.md), and half of such a step saves as much; to more processes than there are
# cores it takes longer (gymnasium's AsyncVectorEnv 570 us for eight CartPoles on two), and is better only for environments that
# wait, for another program say.
GROUPED_FROM = 150e-6
ASYNC_FROM = 5e-3


def choose_vectorization(
    env_id: str,
    num_envs: int,
    wanted: str,
    env_kwargs: Mapping[str, Any],
    num_threads: int | None = None,
    deadline: Deadline = NO_DEADLINE,
) -> tuple[str, str]:
    """What "auto" means for this environment on this machine.

    Returns:
        "entry-point", "sync", "grouped" or "async" (`wanted` itself unless that is "auto"), and the reason in a few words.

    Raises:
        UsageError: as `make_vec`.
    """
    if wanted != "auto":
        return wanted, "as --vectorization asks"
    if is_atari(env_id):
        return "entry-point", "ALE's own vector environment"
    if default_vectorization(env_id) == "entry-point":
        return "entry-point", "the environment's own vector class"
    if num_envs == 1:
        return "sync", "one environment"
    num_groups = num_processes(num_envs, num_threads)
    if num_groups == 1:
        return "sync", "one core"
    sync = step_seconds(make_vec(env_id, num_envs, "sync", env_kwargs, num_threads, deadline)[0], deadline)
    if sync == float("inf"):
        return "sync", "a trial step failed"
    if sync < GROUPED_FROM:
        return "sync", f"a step takes {sync * 1e3:.2f} ms, too little to share out"
    processes = {"grouped": num_groups} | ({"async": num_envs} if sync >= ASYNC_FROM else {})
    seconds = {"sync": sync}
    told = [f"a step takes {sync * 1e3:.2f} ms in one process"]
    for vectorization, count in processes.items():
        try:
            taken = step_seconds(make_vec(env_id, num_envs, vectorization, env_kwargs, num_threads, deadline)[0], deadline)
        except UsageError:  # no processes to be had, in a daemonic one for instance
            taken = float("inf")
        told.append(f"{taken * 1e3:.2f} ms in {count}" if taken < float("inf") else f"a trial in {count} failed")
        seconds[vectorization] = taken
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] < 0.9 * sync else "sync", ", ".join(told)


def step_seconds(envs: VectorEnv, deadline: Deadline = NO_DEADLINE) -> float:
    """Seconds of one vector step under random actions, at most PROBE_STEPS of them; closes `envs`. inf where it fails.

    An environment that fails here fails in training too, where it is reported.
    """
    try:
        envs.action_space.seed(seed_of(0, Stream.PROBE_ACTIONS))
        with deadline:
            envs.reset(seed=environment_seed(0, Stream.PROBE_ENVIRONMENTS))
        started = time.perf_counter()
        steps = 0
        while steps < PROBE_STEPS and time.perf_counter() - started < PROBE_SECONDS:
            with deadline:
                envs.step(envs.action_space.sample())
            steps += 1
        return (time.perf_counter() - started) / steps
    except ENVIRONMENT_ERRORS:
        return float("inf")
    finally:
        with contextlib.suppress(*ENVIRONMENT_ERRORS), deadline:
            envs.close()
