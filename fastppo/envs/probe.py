"""Sync or async, for environments without a vector entry point of their own: decided by a short trial. Costs no torch."""

import time
from collections.abc import Mapping
from typing import Any

from gymnasium.vector import VectorEnv

from fastppo.envs.atari import is_atari
from fastppo.envs.make import default_vectorization, make_vec
from fastppo.errors import UsageError

PROBE_STEPS = 50
PROBE_SECONDS = 0.5
# Handing a step to processes and back takes about this long whatever they do (616 us for eight CartPoles, two cores): below
# it there is nothing to win, and no process is started to find out.
ASYNC_OVERHEAD = 1e-3


def choose_vectorization(env_id: str, num_envs: int, wanted: str, env_kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """What "auto" means for this environment on this machine.

    Returns:
        "entry-point", "sync" or "async" (`wanted` itself unless that is "auto"), and the reason in a few words.

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
    sync = step_seconds(make_vec(env_id, num_envs, "sync", env_kwargs)[0])
    if sync == float("inf"):
        return "sync", "a trial step failed"
    if sync < ASYNC_OVERHEAD:
        return "sync", f"a step takes {sync * 1e3:.2f} ms, too little to share out"
    try:
        parallel = step_seconds(make_vec(env_id, num_envs, "async", env_kwargs)[0])
    except UsageError:  # no processes to be had, in a daemonic one for instance
        parallel = float("inf")
    if parallel == float("inf"):
        return "sync", f"a trial in {num_envs} processes failed"
    choice = "async" if parallel < 0.9 * sync else "sync"
    return choice, f"a step takes {sync * 1e3:.1f} ms in one process, {parallel * 1e3:.1f} ms in {num_envs}"


def step_seconds(envs: VectorEnv) -> float:
    """Seconds of one vector step under random actions, at most PROBE_STEPS of them; closes `envs`. inf where it fails.

    An environment that fails here fails in training too, where it is reported.
    """
    try:
        envs.action_space.seed(0)
        envs.reset(seed=0)
        started = time.perf_counter()
        steps = 0
        while steps < PROBE_STEPS and time.perf_counter() - started < PROBE_SECONDS:
            envs.step(envs.action_space.sample())
            steps += 1
        return (time.perf_counter() - started) / steps
    except Exception:
        return float("inf")
    finally:
        envs.close()
