"""Is the environment what it says it is? A few resets and random steps before training, and one line for what is wrong.

Two degrees, by one rule. An ERROR is what training cannot use or would learn nonsense from, and is refused: a call that raises,
another form than gymnasium's (observation, info) and five values of a step, an info that is no dict, an observation of another
structure or shape than its space, numbers that its type would cut off, numbers that are not finite or too large for float32, a
vector class that resets within the step and declares nothing, a final observation that the reset has overwritten, masks that
come only sometimes. A WARNING is what training can live with, and is told once: an observation outside its bounds or of
another type that loses nothing, a reset(seed) that does not repeat itself, random numbers that --seed does not reach,
environments that all start alike, numbers where `terminated` should be a bool, an end or a reward in a step that only resets, a
mask that allows nothing, running statistics in a wrapper, and what else gymnasium's own checker finds.

Environments that are made one by one (sync, grouped, async) are checked on one copy made for it, so that those that train are
as they were; then gymnasium's checker has it, unless resets are slow or actions masked: it acts at random. The copy also tells
how long a step takes and how wide masks are. It is reset once where that takes half a second, else four times,
and 15 times more by gymnasium's checker where all of these take no longer than that. The global random generators are put back.

A vector class may be the only one that its machine can hold (a simulator on a GPU): that very one is reset and stepped, and
training resets it with a seed of its own. ALE and EnvPool load every game anew when they are seeded (0.1 s each) and are seeded
as tests of ours hold, so that is not tried here.

Of gymnasium's checker left out is what is no fault here: advice on rendering, wrappers, unbounded spaces and normalised actions
(what is sampled is clipped to the bounds), observations and infos that share memory with earlier ones (vector environments
copy), infos that differ (nothing is learned from them), an end after one step; and what is told above in words of ours.

Knows nothing of policies or learning, and costs no torch where the environment brings none.
"""

import contextlib
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.utils import env_checker
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.check_ends import ACTION_COUNTS, NOT_DECLARED, FinalObs, NextAction, action_like, arrays_of, leaves, numbers
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.streams import draw_from_streams, moved_streams, states_of_streams, untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, NoAnswer, UsageError, brief, located, shown_place
from fastppo.random_streams import Stream, seed_of

STEPS = 32  # random ones, at most
SECONDS = 0.5  # after which no more are begun; gymnasium's checker is left out where it would take longer
SEED = 123
# tried where all environments start alike: two that toss a coin are alike in half of the resets
OTHER_SEEDS = range(1000, 1008)
GYMNASIUM_RESETS, GYMNASIUM_STEPS = 15, 6  # calls of its checker
FLOAT32_MAX = float(np.finfo(np.float32).max)
NO_BOUND = 1e38  # as policy/spaces.py
# attributes of gymnasium's NormalizeObservation and NormalizeReward, for one environment or many, and of wrappers after them
STATISTICS = {"obs_rms": "--norm-obs", "return_rms": "--norm-reward", "ret_rms": "--norm-reward"}

ONE_BY_ONE = tuple(f"gymnasium/{vectorization}" for vectorization in ("sync", "grouped", "async"))
UNSEEDED = ("ale", "envpool")

_NOT_TOLD = (
    "is different from the unwrapped version",
    "This is probably too ",
    "we recommend using a symmetric and normalized space",
    "share an object",
    "step info",
    "truncates after 1 step",
    # told in our words
    "is not within the observation space",
    "was expecting",
    "should be an int or np.int64",
    "Using `env.reset(seed=123)` is non-deterministic",
    "Using `env.reset(seed=123)` observations are not equal",
    "signal to be a boolean",
    "The reward ",
)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in one line; is_error: see the module's docstring.

    trains: an error that --no-check-env trains with all the same.
    """

    line: str
    is_error: bool
    trains: bool = False


@dataclass(frozen=True)
class Tried:
    """What came of trying one copy of an environment."""

    findings: tuple[Finding, ...]
    was_made: bool = True  # False: there cannot be another one, or none at all
    step_seconds: float = math.inf  # the median of its steps; inf: they could not be made
    computing: float = 1.0  # share of these seconds in which this process computed, and did not wait
    mask_size: int | None = None  # numbers in its info's action_mask; None: there is none
    varies: bool = False  # it is known to start in different ways
    repeats: bool = True  # reset twice with one seed it has started alike

    @property
    def ran(self) -> bool:
        """Whether it could be reset and stepped."""
        return math.isfinite(self.step_seconds)


def check_envs(
    envs: VectorEnv,
    env_id: str,
    env_kwargs: Mapping[str, Any],
    engine: str,
    deadline: Deadline = NO_DEADLINE,
    tried: Tried | None = None,
) -> list[str]:
    """Check the environments of a run before it starts.

    Args:
        envs: those that will be trained on, `engine` who runs them: see fastppo.envs.factory.engine_name.
        deadline: for all of it.
        tried: what `try_copy` returned, where that has been called already.

    Returns:
        Lines to tell, one a warning.

    Raises:
        UsageError: there are errors, one a line.
    """
    if tried is not None:
        findings = list(tried.findings)
    else:
        try:
            with deadline:
                findings = find(envs, env_id, env_kwargs, engine)
        except NoAnswer as error:
            findings = [_no_answer(error)]
    errors = [finding for finding in findings if finding.is_error]
    if errors:
        hint = " (--no-check-env trains all the same)" if all(error.trains for error in errors) else ""
        raise UsageError("\n".join(f"--env-id {env_id}: {error.line}" for error in errors) + hint)
    return [f"check: {finding.line}" for finding in findings]


def _no_answer(error: NoAnswer) -> Finding:
    return Finding(f"tried before training, it gives {located(error)}", is_error=True)


def find(envs: VectorEnv, env_id: str, env_kwargs: Mapping[str, Any], engine: str) -> list[Finding]:
    """What is wrong with environments made as `check_envs` says; nothing is printed, and no process started."""
    if engine in ONE_BY_ONE:
        return list(try_copy(env_id, env_kwargs, envs.num_envs).findings)
    parts = getattr(envs, "envs", ())
    if parts and isinstance(parts[0], VectorEnv):  # of many seeds: joining them copies what the class itself returns
        envs = parts[0]
    watch = _Watch(envs.single_observation_space, (envs.num_envs,))
    with _unseen():
        _try_out(_WatchedVectorEnv(envs, watch), watch, seeded=engine not in UNSEEDED)
        _statistics(envs, watch)
    return list(watch.found.values())


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """No warnings are shown, and the global random generators are put back."""
    with warnings.catch_warnings(), untouched_streams():
        warnings.simplefilter("ignore")
        yield


def try_copy(env_id: str, env_kwargs: Mapping[str, Any], num_envs: int, deadline: Deadline = NO_DEADLINE) -> Tried:
    """Make one environment as a run of `num_envs` has them, look at what it does, and close it. Its failures are findings."""
    copies: VectorEnv | None = None
    try:
        with _unseen(), deadline:
            env = gym.make(env_id, disable_env_checker=True, **env_kwargs)
            watch = _Watch(env.observation_space, ())
            copies = SyncVectorEnv([lambda: _WatchedEnv(env, watch)])
            return _tried(copies, watch, num_envs)
    except NoAnswer as error:
        return Tried((_no_answer(error),), was_made=copies is not None)
    except (Exception, SystemExit) as error:  # one that may exist only once, perhaps
        line = f"left out, since a copy of the environment to try out cannot be made: {located(error)}"
        return Tried((Finding(line, is_error=False),), was_made=False)
    finally:
        if copies is not None:
            # a failure to close is seen where those that train are closed
            with contextlib.suppress(*ENVIRONMENT_ERRORS), untouched_streams(), deadline:
                copies.close()
            copies.closed = True  # gymnasium before 1.4 tries again, and prints what is raised, when they are collected


def _tried(copies: VectorEnv, watch: "_Watch", num_envs: int) -> Tried:
    times = _try_out(copies, watch, seeded=True, num_envs=num_envs)
    _statistics(copies, watch)
    if times is None:
        return Tried(tuple(watch.found.values()))
    if not times.masked:
        seconds = GYMNASIUM_RESETS * times.reset + GYMNASIUM_STEPS * times.step
        if seconds < SECONDS:
            _gymnasium(_WithSampled(copies.envs[0].env), watch)  # type: ignore[attr-defined]  # not watched
        else:
            watch.warn("slow", f"gymnasium's checker is left out: with {GYMNASIUM_RESETS} resets it would take {seconds:.1f} s")
    step_seconds = statistics.median(watch.seconds)
    computing = min(statistics.median(watch.cpu_seconds) / max(step_seconds, 1e-9), 1.0)  # a clock may be coarse
    found = tuple(watch.found.values())
    return Tried(found, True, step_seconds, computing, times.mask_size, times.varies, times.repeats)


# --- what each call returns


class _RefusedError(Exception):
    """There is an error among the findings, and nothing to go on with."""


@dataclass
class _Watch:
    """Looks at what an environment's reset and step return, of one environment (lead ()) or of N ((N,))."""

    space: gym.Space[Any]
    lead: tuple[int, ...]
    found: dict[str, Finding] = field(default_factory=dict)  # by kind and place: of each the first
    when: str = ""
    last: Any = None  # what the last step returned
    seconds: list[float] = field(default_factory=list)  # of each step
    cpu_seconds: list[float] = field(default_factory=list)  # of this process in it
    signature: str = "reset(self, *, seed=None, options=None)"  # that its reset has to have, and where that is written

    def error(self, key: str, line: str, trains: bool = False) -> None:
        self.found.setdefault(key, Finding(line, is_error=True, trains=trains))

    def warn(self, key: str, line: str) -> None:
        self.found.setdefault(key, Finding(line, is_error=False))

    def refuse(self) -> None:
        """Leave by an exception where there is an error."""
        if any(finding.is_error for finding in self.found.values()):
            raise _RefusedError

    def reset(self, call: Callable[[], Any]) -> Any:
        """What `call()`, a reset, returns, looked at."""
        self.when = "after a reset"
        result = self._call("reset", call)
        if not isinstance(result, tuple) or len(result) != 2:
            self.error("reset", f"reset returned {_told(result)}; it has to return two values, observation and info")
        self.refuse()
        obs, info = result
        self._info("reset", info)
        self.obs(obs, self.space, "observation")
        self.refuse()
        return result

    def step(self, call: Callable[[], Any]) -> Any:
        """What `call()`, a step, returns, looked at."""
        self.when = "after a step"
        began, cpu_began = time.perf_counter(), time.process_time()
        result = self._call("step", call)
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        if not isinstance(result, tuple) or len(result) != 5:
            self.error(
                "step",
                f"step returned {_told(result)}; it has to return five: observation, reward, terminated, truncated, info",
            )
        self.refuse()
        obs, reward, terminated, truncated, info = result
        self._info("step", info)
        self.obs(obs, self.space, "observation")
        self._reward(reward)
        self._flag("terminated", terminated)
        self._flag("truncated", truncated)
        self.refuse()
        self.last = result
        return result

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            hint = f"; it has to be {self.signature}" if "unexpected keyword" in str(error) else ""
            self.error("raises", f"{what} raised {located(error)}{hint}")
            raise _RefusedError from error

    def _info(self, what: str, info: Any) -> None:
        if not isinstance(info, dict):
            self.error(
                "info", f"{what} returned {_told(info)} as info; it has to be a dict, {{}} where there is nothing to tell"
            )

    def _reward(self, reward: Any) -> None:
        array = numbers(reward)
        if array is None:
            self.error("reward", f"reward is {_told(reward)}, not a number")
        elif array.shape != self.lead:
            self.error("reward", f"reward has shape {array.shape}; it has to be {self.lead or 'a number'}")
        elif (unusable := _unusable(array)) is not None:
            self.error("reward", f"reward {unusable} {self.when}")

    def _flag(self, name: str, value: Any) -> None:
        array = numbers(value)
        if array is None or not ((array == 0) | (array == 1)).all():
            self.error(name, f"{name} is {_told(value)}, not True or False", trains=value is None or array is not None)
        elif array.shape != self.lead:
            self.error(name, f"{name} has shape {array.shape}; it has to be {self.lead or 'a bool'}")
        elif array.dtype != bool:
            self.warn(name, f"{name} is {_told(value)}; a bool is meant")

    def obs(self, obs: Any, space: gym.Space[Any], name: str) -> None:
        """Is an observation in its space, with `lead` in front?"""
        if isinstance(space, Dict):
            if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
                has = f"has the keys {', '.join(map(str, obs))}" if isinstance(obs, Mapping) else f"is {_told(obs)}"
                self.error(name, f"{name} {has}; its space is a Dict of {', '.join(space.spaces)}")
                return
            for key, part in space.spaces.items():
                self.obs(obs[key], part, f"{name}[{key!r}]")
        elif isinstance(space, Tuple):
            if not isinstance(obs, tuple | list) or len(obs) != len(space.spaces):
                self.error(name, f"{name} is {_told(obs)}; its space is a Tuple of {len(space.spaces)}")
                return
            for index, part in enumerate(space.spaces):
                self.obs(obs[index], part, f"{name}[{index}]")
        else:
            self._leaf(obs, space, name)

    def _leaf(self, leaf: Any, space: gym.Space[Any], name: str) -> None:
        array, expected = numbers(leaf), (*self.lead, *(space.shape or ()))
        if array is None:
            self.error(name, f"{name} is {_told(leaf)}; its space is {_short(space)}")
        elif array.shape != expected:
            self.error(name, f"{name} has shape {array.shape}; its space, {_short(space)}, says {expected}")
        elif (unusable := _unusable(array)) is not None:
            self.error(name, f"{name} {unusable} {self.when}")
        else:
            self._type(array, leaf, space, name)
            self._bounds(array, space, name)

    def _type(self, array: NDArray[Any], leaf: Any, space: gym.Space[Any], name: str) -> None:
        if array.dtype == space.dtype or not hasattr(leaf, "dtype"):
            return
        fits = np.can_cast(array.dtype, np.dtype(space.dtype), "same_kind")
        # gymnasium's vector environments refuse such a type; one of its own may bring whole numbers as floats
        if not fits and (not self.lead or (array != array.astype(space.dtype)).any()):
            self.error(
                f"type {name}",
                f"{name} is of type {array.dtype}, which does not fit its space's {space.dtype}: "
                "convert it, or declare another",
                trains=bool(self.lead),
            )
        elif not fits or (isinstance(space, Box) and not (array.dtype.kind == "f" and is_tensor(leaf))):
            self.warn(f"type {name}", f"{name} is of type {array.dtype}; its space says {space.dtype}")

    def _bounds(self, array: NDArray[Any], space: gym.Space[Any], name: str) -> None:
        low, high = _bounds_of(space)
        outside = (array < low) | (array > high)
        if outside.any():
            low, high = (np.broadcast_to(bound, array.shape) for bound in (low, high))
            bounds = f"{_first(low, outside)} to {_first(high, outside)}"
            self.warn(f"bounds {name}", f"{name} is outside its space {self.when}: {_first(array, outside)}, bounds {bounds}")


class _WatchedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """One environment, looked at."""

    def __init__(self, env: gym.Env[Any, Any], watch: _Watch) -> None:
        super().__init__(env)
        self.metadata = dict(env.metadata)  # before gymnasium 1.4 SyncVectorEnv writes to it, and it is its class's
        self._watch = watch
        code = getattr(getattr(env.unwrapped, "reset", None), "__code__", None)
        if code is not None:
            watch.signature += f" at {shown_place(code.co_filename, code.co_firstlineno)}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._watch.reset(lambda: self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        return self._watch.step(lambda: self.env.step(action))


class _WithSampled(gym.Wrapper[Any, Any, Any, Any]):
    """One environment whose action space can be sampled."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        self.action_space = sampled_space(env.action_space)


class _WatchedVectorEnv(VectorWrapper):
    """N environments, looked at."""

    def __init__(self, env: VectorEnv, watch: _Watch) -> None:
        super().__init__(env)
        self._watch = watch

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._watch.reset(lambda: self.env.reset(seed=seed, options=options))

    def step(self, actions: Any) -> Any:
        return self._watch.step(lambda: self.env.step(actions))


# --- what the calls say together


@dataclass(frozen=True)
class _Times:
    """Seconds of a vector environment's reset and of its slowest step; whether its actions are masked."""

    reset: float
    step: float
    masked: bool
    mask_size: int | None  # see Tried
    varies: bool
    repeats: bool


def _try_out(envs: VectorEnv, watch: _Watch, seeded: bool, num_envs: int = 0) -> _Times | None:
    """Reset and step `envs`, which are watched; None where that had to be given up for an error.

    num_envs: of the run, where `envs` is one copy.
    """
    try:
        return _resets_and_steps(AutoresetEnvs(envs), watch, seeded, num_envs)
    except _RefusedError:
        return None
    except EnvironmentFailed as error:  # against the rules of envs/autoreset.py
        watch.error("raises", brief(error))
        return None
    except Exception as error:  # of the class that makes one environment of N
        watch.error("raises", f"{located(error)} {watch.when}")
        return None


def _resets_and_steps(envs: AutoresetEnvs, watch: _Watch, seeded: bool, num_envs: int) -> _Times:
    streams = states_of_streams()
    started = time.perf_counter()
    space = envs.envs.single_observation_space
    obs, mask = envs.reset_and_mask(SEED if seeded else None)
    mask_size = None if mask is None else math.prod(mask.shape[1:])
    reset_seconds, varies, repeats = time.perf_counter() - started, False, True
    drawn_from, seeded_by_env = set(moved_streams(streams, states_of_streams())), set[str]()
    if seeded and reset_seconds < SECONDS:
        first, streams = arrays_of(obs, space), states_of_streams()
        draw_from_streams()
        again = time.perf_counter()
        obs, mask = envs.reset_and_mask(SEED)
        reset_seconds = time.perf_counter() - again  # without what is made once
        seeded_by_env = set(streams) - set(moved_streams(streams, states_of_streams()))
        repeats = _equal(first, arrays_of(obs, space))
        varies = not repeats
        if varies:
            watch.warn("seed", "reset with the same seed twice gave two different first observations: runs cannot be repeated")
        if envs.num_envs > 1 and _alike(first):
            _seeds_told_apart(envs, watch, first, started)
            obs, mask = envs.reset_and_mask(SEED)
        elif num_envs > 1 and not varies:
            varies = _copy_varies(envs, watch, first, num_envs, started)
            obs, mask = envs.reset_and_mask(SEED)
    streams = states_of_streams()
    step_seconds, masked = _steps(envs, watch, seeded, obs, mask)
    drawn_from |= set(moved_streams(streams, states_of_streams()))
    _streams_told(envs, watch, drawn_from - seeded_by_env)
    return _Times(reset_seconds, step_seconds, masked, mask_size, varies, repeats)


def _steps(envs: AutoresetEnvs, watch: _Watch, seeded: bool, obs: Any, mask: Any) -> tuple[float, bool]:
    """Random steps from `obs` and `mask` on; seconds of the slowest, and whether actions are masked."""
    space, single = envs.envs.single_observation_space, envs.envs.single_action_space
    actions = batch_space(sampled_space(single), envs.num_envs)
    actions.seed(seed_of(SEED, Stream.CHECK_ACTIONS))
    rng = np.random.default_rng(seed_of(SEED, Stream.CHECK_MASKS))
    done, masked, step_seconds = np.zeros(envs.num_envs, bool), False, 0.0
    started = time.perf_counter()
    final, following = FinalObs(space), NextAction(envs)
    for _ in range(STEPS):
        in_obs = obs.get("action_mask") if isinstance(obs, Mapping) else None
        legal = numbers(mask if in_obs is None else in_obs)
        masked |= legal is not None
        action = actions.sample() if legal is None else _legal(single, legal.reshape(envs.num_envs, -1) != 0, done, rng, watch)
        began = time.perf_counter()
        step = envs.step(action_like(action, next(leaves(obs, space))))
        step_seconds = max(step_seconds, time.perf_counter() - began)
        following.look(action, step, done)
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = (np.asarray(numbers(x)) for x in (step.reward, step.terminated, step.truncated))
        ended = (terminated != 0) | (truncated != 0)
        if step.final_obs is not None:
            _Watch(space, (envs.num_envs,), watch.found, "at an end").obs(step.final_obs, space, "final observation")
            watch.refuse()
        if envs.mode is AutoresetMode.SAME_STEP and (line := final.look(watch.last[0], watch.last[-1], ended)) is not None:
            watch.error("final_obs", line)
            watch.refuse()
        if envs.mode is AutoresetMode.NEXT_STEP and (done & (ended | (reward != 0))).any():
            watch.warn(
                "autoreset",
                "the step after an end paid a reward or ended again: with autoreset_mode NEXT_STEP it only resets, and is not "
                "learned from; declare metadata['autoreset_mode'] SAME_STEP or DISABLED if that is what the class does",
            )
        done = ended & (envs.mode is AutoresetMode.NEXT_STEP)
        if time.perf_counter() - started > SECONDS:
            break
    if (line := final.suspicion()) is not None:
        watch.warn("final_obs", line)
    if not envs.is_declared:
        if not following.is_known or masked or not seeded:
            watch.warn("not declared", NOT_DECLARED)
        elif following.counts(SEED, SECONDS):
            watch.found.pop("autoreset", None)  # of the same cause
            watch.error("autoreset", ACTION_COUNTS)
    return step_seconds, masked


def sampled_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """An action space to sample from: a bound beyond NO_BOUND is none. Up to float64's largest gymnasium cannot sample."""
    if not isinstance(space, Box) or space.dtype.kind != "f":
        return space
    low, high = (
        np.where(np.abs(bound.astype(np.float64)) < NO_BOUND, bound, np.copysign(np.inf, bound))
        for bound in (space.low, space.high)
    )
    return Box(low, high, dtype=space.dtype.type)


def _statistics(envs: Any, watch: _Watch) -> None:
    """Wrappers, of the vector environment or of one of its environments, whose running statistics a run does not keep."""
    while envs is not None:
        for name, flag in STATISTICS.items():
            if isinstance(envs, AsyncVectorEnv):
                found = "a wrapper" if any(envs.call("has_wrapper_attr", name)) else None
            else:
                found = type(envs).__name__ if name in getattr(envs, "__dict__", {}) else None
            if found is not None and getattr(envs, "update_running_mean", True):
                watch.warn(
                    flag,
                    f"the environment is inside {found}, whose running statistics are not kept with the run and start anew in "
                    f"evaluation: leave it out and use {flag}",
                )
        inside = list(getattr(envs, "envs", ()))[:1]
        envs = inside[0] if inside else getattr(envs, "env", None)


def _streams_told(envs: AutoresetEnvs, watch: _Watch, drawn_from: set[str]) -> None:
    if drawn_from:
        watch.found.pop("seed", None)  # which is why
        # functions on tensors are given their random numbers (envs/device.py)
        on_device = hasattr(getattr(envs.envs.unwrapped, "env", None), "num_random")
        watch.warn(
            "streams",
            f"it draws from {' and '.join(sorted(drawn_from))}, which --seed does not reach, so a run cannot be repeated: "
            + ("use the argument random" if on_device else "draw from self.np_random"),
        )


def _seeds_told_apart(envs: AutoresetEnvs, watch: _Watch, first: list[NDArray[Any]], started: float) -> None:
    """All environments started alike: is it that they always start so, or that they share one seed?"""
    differs = False
    for seed in OTHER_SEEDS:
        if time.perf_counter() - started > SECONDS:
            return
        other = arrays_of(envs.reset_and_mask(seed)[0], envs.envs.single_observation_space)
        if not _alike(other):
            return
        differs |= not _equal(first, other)
    if differs:
        watch.warn(
            "alike", f"all {envs.num_envs} environments start alike whatever the seed: each needs random numbers of its own"
        )


def _copy_varies(envs: AutoresetEnvs, watch: _Watch, first: list[NDArray[Any]], num_envs: int, started: float) -> bool:
    """Whether one environment starts in different ways; the same question of seeds that N environments of a run would have."""
    differs, space = False, envs.envs.single_observation_space
    for seed in (SEED, *OTHER_SEEDS):
        if time.perf_counter() - started > SECONDS:
            return differs
        one = first if seed == SEED else arrays_of(envs.reset_and_mask(seed)[0], space)
        if not _equal(one, arrays_of(envs.reset_and_mask(seed + 1)[0], space)):
            return True
        differs |= not _equal(first, one)
    if differs:
        watch.warn("alike", f"all {num_envs} environments start alike whatever the seed: each needs random numbers of its own")
    return differs


def _equal(one: list[NDArray[Any]], other: list[NDArray[Any]]) -> bool:
    return all(map(np.array_equal, one, other))


def _alike(arrays: list[NDArray[Any]]) -> bool:
    """Whether all environments observe the same; arrays (N, ...)."""
    return all((array == array[:1]).all() for array in arrays)


def _legal(
    space: gym.Space[Any], mask: NDArray[np.bool_], done: NDArray[np.bool_], rng: np.random.Generator, watch: _Watch
) -> NDArray[Any]:
    """Random actions (N, *shape) among those that mask (N, A) allows; any where it allows none, as at an episode's end."""
    sizes = [int(n) for n in np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))]
    if isinstance(space, MultiBinary):
        sizes = [2] * int(np.prod(space.shape))
    parts = np.split(mask, np.cumsum(sizes)[:-1], axis=-1)
    if any((~part.any(-1) & ~done).any() for part in parts):
        watch.warn("mask", "action_mask allows no action in the middle of an episode")
    chosen = np.stack([((1.0 + rng.random(part.shape)) * part).argmax(-1) for part in parts], -1)
    chosen = chosen.reshape(len(mask), *(space.shape or ()))
    return np.asarray(chosen + getattr(space, "start", 0), space.dtype)


# --- gymnasium's checker


def _gymnasium(env: gym.Env[Any, Any], watch: _Watch) -> None:
    """What gymnasium's checker says of one environment, as far as it is a fault here, as warnings."""
    lines = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            env_checker.check_env(env, skip_render_check=True, skip_close_check=True)
        except Exception as error:
            lines.append(_said(error))
    lines += [str(warning.message) for warning in told if "WARN: " in str(warning.message)]
    for line in lines:
        if not any(part in line for part in _NOT_TOLD):
            text = re.sub(r"\x1b\[[0-9;]*m|WARN: ", "", line).strip()
            watch.warn(text, f"gymnasium: {text}")


def _said(error: Exception) -> str:
    """What the checker found, or what the environment raised under it."""
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    folder = Path(env_checker.__file__).parent
    if innermost is not None and Path(innermost.tb_frame.f_code.co_filename).parent == folder:
        return str(error).replace("\n", " ")
    return f"the environment raised {located(error)} under its checker"


# --- numbers and words


def _bounds_of(space: gym.Space[Any]) -> tuple[Any, Any]:
    """The least and the greatest values, inclusive."""
    if isinstance(space, Box):
        if space.dtype.kind != "f":
            return space.low, space.high
        # EnvPool means the lowest number there is by C++'s min(), which is the smallest above 0
        return np.where(space.low == np.finfo(space.dtype).tiny, -np.inf, space.low), space.high
    if isinstance(space, Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1


def _unusable(array: NDArray[Any]) -> str | None:
    """What is wrong with numbers that training cannot hold, which is in float32; None: nothing."""
    for wrong, what in ((~np.isfinite(array), "is not finite"), (np.abs(array) > FLOAT32_MAX, "is too large for float32")):
        if wrong.any():
            return f"{what} ({_first(array, wrong)})"
    return None


def _first(array: NDArray[Any], where: NDArray[np.bool_]) -> str:
    """The first of the numbers that are meant."""
    return f"{array[where].flat[0]:g}"


def _told(value: Any) -> str:
    """What it is, in two or three words."""
    if isinstance(value, tuple):
        return f"{len(value)} values"
    if isinstance(value, bool | int | float | str | None):
        return repr(value)[:40]
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = type(value).__name__
    return f"{kind} {tuple(shape)} {dtype}" if isinstance(shape, tuple) and dtype is not None else f"a {kind}"


def _short(space: gym.Space[Any]) -> str:
    text = str(space)
    return text if len(text) < 80 else type(space).__name__
