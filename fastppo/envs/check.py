"""Check before training that an environment does what it says: a few resets and random steps, one line for each finding.

An ERROR is something that training cannot use or would learn nonsense from. It is refused: a call that raises, a result of
another form than gymnasium's, an info that is no dict, an observation of another structure or shape than its space, numbers
that their type would cut off, numbers that are not finite or too large for float32, a vector class that resets within the step
and does not declare it, a final observation that the reset has overwritten, masks that come only sometimes.

A WARNING is something that training can live with. It is printed once: an observation outside its bounds or of another type
that loses nothing, a reset(seed) that does not repeat itself, random numbers that --seed does not reach, environments that all
start alike, numbers where `terminated` should be a bool, an end or a reward in a step that only resets, a mask that allows
nothing, running statistics in a wrapper, and other findings of gymnasium's own checker.

Environments that are made one by one (sync, grouped, async) are checked on one copy, so that the environments of the run stay
untouched. Then gymnasium's checker gets the copy, unless resets are slow or actions are masked, since it acts at random. The
copy also tells how long a step takes and how wide masks are. It is reset once where a reset takes half a second, else four
times, and 15 times more by gymnasium's checker where all of these take no longer than half a second. The global random
generators are put back.

A machine may be able to hold a vector class only once (a simulator on a GPU), so the run's own is reset and stepped; training
resets it with its own seed. ALE and EnvPool load every game again when they are seeded (0.1 s each), and tests hold that they
are seeded, so seeds are not tried there.

Findings of gymnasium's checker are left out where they are no fault here (`_NOT_SHOWN`): advice on rendering, wrappers,
unbounded spaces and normalised actions (samples are clipped to the bounds), observations and infos that share memory with
earlier ones (vector environments copy), infos that differ (nothing is learned from them), an end after one step, and findings
that are reported above in our own words.

check_calls.py checks what one call returns, check_trial.py runs the resets and steps, check_ends.py checks the ends of
episodes. Knows nothing of policies or learning. Does not import torch unless the environment does.
"""

import contextlib
import math
import re
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.utils import env_checker
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from fastppo.envs import check_trial
from fastppo.envs.agents import agents_of
from fastppo.envs.check_calls import CallChecker, CheckedEnv, CheckedVectorEnv, Finding
from fastppo.envs.check_trial import run_trial, sampled_space
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.numbered import EnvFn
from fastppo.envs.streams import untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, NoAnswer, UsageError, located

GYMNASIUM_RESETS, GYMNASIUM_STEPS = 15, 6  # calls by gymnasium's checker
# attributes of gymnasium's NormalizeObservation and NormalizeReward, for one environment or many, and of wrappers after them
STATISTICS = {"obs_rms": "--norm-obs", "return_rms": "--norm-reward", "ret_rms": "--norm-reward"}

ONE_BY_ONE = tuple(f"gymnasium/{vectorization}" for vectorization in ("sync", "grouped", "async"))
UNSEEDED = ("ale", "envpool")

_NOT_SHOWN = (
    "is different from the unwrapped version",
    "This is probably too ",
    "we recommend using a symmetric and normalized space",
    "share an object",
    "step info",
    "truncates after 1 step",
    # reported in our words
    "is not within the observation space",
    "was expecting",
    "should be an int or np.int64",
    "Using `env.reset(seed=123)` is non-deterministic",
    "Using `env.reset(seed=123)` observations are not equal",
    "signal to be a boolean",
    "The reward ",
)


@dataclass(frozen=True)
class Tried:
    """The result of trying one copy of an environment."""

    findings: tuple[Finding, ...]
    was_made: bool = True  # False: no copy could be made beside the run's environments
    step_seconds: float = math.inf  # median; inf: it could not be stepped
    computing: float = 1.0  # share of these seconds in which this process computed and did not wait
    mask_size: int | None = None  # numbers in its info's action_mask; None: there is none
    varies: bool = False  # it is known to start in different states
    repeats: bool = True  # two resets with one seed started alike
    episode_length: float = math.inf  # mean in steps, of random actions; inf: not known, or of several agents

    @property
    def ran(self) -> bool:
        """Whether it could be reset and stepped."""
        return math.isfinite(self.step_seconds)


def check_envs(
    envs: VectorEnv, env_id: str, engine: str, deadline: Deadline = NO_DEADLINE, tried: Tried | None = None
) -> list[str]:
    """Check the environments of a run before it starts.

    Args:
        envs: the environments of the run.
        engine: what steps them, as fastppo.envs.factory.engine_name returns it.
        deadline: for the whole check.
        tried: the result of `try_copy`, for environments that are made one by one.

    Returns:
        A line for each warning.

    Raises:
        UsageError: there are errors; a line for each.
    """
    if tried is not None:
        findings = list(tried.findings)
    else:
        try:
            with deadline:
                findings = find(envs, engine)
        except NoAnswer as error:
            findings = [_no_answer(error)]
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        hint = " (--no-check-env trains all the same)" if all(error.trains for error in errors) else ""
        raise UsageError("\n".join(f"--env-id {env_id}: {error.line}" for error in errors) + hint)
    return [f"check: {finding.line}" for finding in findings]


def _no_answer(error: NoAnswer) -> Finding:
    return Finding(f"tried before training, it gives {located(error)}", is_error=True)


def find(envs: VectorEnv, engine: str) -> list[Finding]:
    """Findings on vector environments that are not made one by one. Prints nothing and starts no process."""
    parts = getattr(envs, "envs", ())
    if parts and isinstance(parts[0], VectorEnv):  # of several seeds: joining copies what the class itself returns
        envs = parts[0]
    checker = CallChecker(envs.single_observation_space, (envs.num_envs,))
    with _no_trace():
        run_trial(CheckedVectorEnv(envs, checker), checker, seeded=engine not in UNSEEDED)
        _statistics(envs, checker)
    return list(checker.found.values())


@contextlib.contextmanager
def _no_trace() -> Iterator[None]:
    """Show no warnings, and put the global random generators back."""
    with warnings.catch_warnings(), untouched_streams():
        warnings.simplefilter("ignore")
        yield


def try_copy(
    make: EnvFn, num_envs: int, deadline: Deadline = NO_DEADLINE, cleanup: contextlib.ExitStack | None = None
) -> Tried:
    """Make one environment of a run of `num_envs` and check it. Its failures are findings.

    cleanup: closes it after the run. Closed before, it may take with it what a package shares between all of its environments,
    as pygame's display. None: it is closed here.
    """
    copies: VectorEnv | None = None
    try:
        with _no_trace(), deadline:
            env = make()
            checker = CallChecker(env.observation_space, ())
            copies = SyncVectorEnv([lambda: CheckedEnv(env, checker)])
            return _tried(copies, checker, num_envs)
    except NoAnswer as error:
        return Tried((_no_answer(error),), was_made=copies is not None)
    except (Exception, SystemExit) as error:  # perhaps there can be only one at a time
        line = f"left out, since a copy of the environment to try out cannot be made: {located(error)}"
        return Tried((Finding(line, is_error=False),), was_made=False)
    finally:
        if copies is not None:
            close = partial(_close, copies, deadline)
            close() if cleanup is None else cleanup.callback(close)


def _close(copies: VectorEnv, deadline: Deadline) -> None:
    # a failure to close is seen where those that train are closed
    with contextlib.suppress(*ENVIRONMENT_ERRORS), untouched_streams(), deadline:
        copies.close()
    copies.closed = True  # gymnasium before 1.4 tries again, and prints what is raised, when they are collected


def _tried(copies: VectorEnv, checker: "CallChecker", num_envs: int) -> Tried:
    times = run_trial(copies, checker, seeded=True, num_envs=num_envs)
    _statistics(copies, checker)
    if times is None:
        return Tried(tuple(checker.found.values()))
    if not times.masked:
        seconds = GYMNASIUM_RESETS * times.reset + GYMNASIUM_STEPS * times.step
        if seconds < check_trial.SECONDS:
            _gymnasium(_WithSampled(copies.envs[0].env), checker)  # type: ignore[attr-defined]  # not watched
        else:
            checker.warn(
                "slow", f"gymnasium's checker is left out: with {GYMNASIUM_RESETS} resets it would take {seconds:.1f} s"
            )
    step_seconds = statistics.median(checker.seconds)
    computing = min(statistics.median(checker.cpu_seconds) / max(step_seconds, 1e-9), 1.0)  # a clock may be coarse
    found = tuple(checker.found.values())
    length = times.episode_length if agents_of(copies) is None else math.inf
    return Tried(found, True, step_seconds, computing, times.mask_size, times.varies, times.repeats, length)


class _WithSampled(gym.Wrapper[Any, Any, Any, Any]):
    """One environment with an action space that gymnasium can sample."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = sampled_space(env.action_space)


def _statistics(envs: Any, checker: CallChecker) -> None:
    """Warn of wrappers whose running statistics a run does not keep, of the vector environment and of one environment in it."""
    while envs is not None:
        for name, flag in STATISTICS.items():
            if isinstance(envs, AsyncVectorEnv):
                found = "a wrapper" if any(envs.call("has_wrapper_attr", name)) else None
            else:
                found = type(envs).__name__ if name in getattr(envs, "__dict__", {}) else None
            if found is not None and getattr(envs, "update_running_mean", True):
                checker.warn(
                    flag,
                    f"the environment is inside {found}, whose running statistics are not kept with the run and start anew in "
                    f"evaluation: leave it out and use {flag}",
                )
        inside = list(getattr(envs, "envs", ()))[:1]
        envs = inside[0] if inside else getattr(envs, "env", None)


def _gymnasium(env: gym.Env[Any, Any], checker: CallChecker) -> None:
    """Add the findings of gymnasium's checker that are faults here, as warnings."""
    lines = []
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            env_checker.check_env(env, skip_render_check=True, skip_close_check=True)
        except Exception as error:
            lines.append(_finding_of(error))
    lines += [str(warning.message) for warning in shown if "WARN: " in str(warning.message)]
    for line in lines:
        if not any(part in line for part in _NOT_SHOWN):
            text = re.sub(r"\x1b\[[0-9;]*m|WARN: ", "", line).strip()
            checker.warn(text, f"gymnasium: {text}")


def _finding_of(error: Exception) -> str:
    """The finding that made the checker raise, or the error that the environment raised under it."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    folder = Path(env_checker.__file__).parent
    if innermost is not None and Path(innermost.tb_frame.f_code.co_filename).parent == folder:
        return str(error).replace("\n", " ")
    return f"the environment raised {located(error)} under its checker"
