"""Is the environment what it says it is? A few resets and random steps before training, and one line for what is wrong.

Two degrees, by one rule. An ERROR is what training cannot use or would learn nonsense from, and is refused: a call that raises,
another form than gymnasium's (observation, info) and five values of a step, an info that is no dict, an observation of another
structure or shape than its space, numbers that its type would cut off, and numbers that are not finite. A WARNING is what
training can live with, and is told once: an observation outside its bounds or of another type that loses nothing, a reset(seed)
that does not repeat itself, environments that all start alike, numbers where `terminated` should be a bool, an end or a reward
in a step that only resets, a mask that allows nothing, and what else gymnasium's own checker finds.

Environments that are made one by one (sync, grouped, async) are checked on at most two copies made for it, so that those that
train are as they were; then gymnasium's checker has one of them, unless resets are slow or actions masked: it acts at random. A
vector class may be the only one that its machine can hold (a simulator on a GPU): that very one is reset and stepped, and
training resets it with a seed of its own. ALE and EnvPool load every game anew when they are seeded (0.1 s each) and are seeded
as tests of ours hold, so that is not tried here.

Of gymnasium's checker left out is what is no fault here: advice on rendering, wrappers, unbounded spaces and normalised actions
(what is sampled is clipped to the bounds), observations and infos that share memory with earlier ones (vector environments
copy), infos that differ (nothing is learned from them), an end after one step; and what is told above in words of ours.

Knows nothing of policies or learning, and costs no torch where the environment brings none.
"""

import contextlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.utils import env_checker
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.errors import NoAnswer, UsageError, brief

STEPS = 32  # random ones, at most
SECONDS = 0.5  # after which no more are begun; gymnasium's checker is left out where it would take longer
SEED = 123
# tried where all environments start alike: two that toss a coin are alike in half of the resets
OTHER_SEEDS = range(1000, 1008)
GYMNASIUM_RESETS, GYMNASIUM_STEPS = 15, 6  # calls of its checker

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
    """One thing that is wrong, in one line; is_error: see the module's docstring."""

    line: str
    is_error: bool


def check_envs(
    envs: VectorEnv, env_id: str, env_kwargs: Mapping[str, Any], engine: str, deadline: Deadline = NO_DEADLINE
) -> list[str]:
    """Check the environments of a run before it starts.

    Args:
        envs: those that will be trained on, `engine` who runs them: see fastppo.envs.backends.engine_name.
        deadline: for all of it.

    Returns:
        Lines to tell, one a warning.

    Raises:
        UsageError: there are errors, one a line.
    """
    try:
        with deadline:
            findings = find(envs, env_id, env_kwargs, engine)
    except NoAnswer as error:
        raise UsageError(f"--env-id {env_id}: tried before training, it gives {error}") from None
    errors = [f"--env-id {env_id}: {finding.line}" for finding in findings if finding.is_error]
    if errors:
        raise UsageError("\n".join(errors) + " (--no-check-env trains all the same)")
    return [f"check: {finding.line}" for finding in findings]


def find(envs: VectorEnv, env_id: str, env_kwargs: Mapping[str, Any], engine: str) -> list[Finding]:
    """What is wrong with environments made as `check_envs` says; nothing is printed, and no process started."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if engine in ONE_BY_ONE:
            make = partial(gym.make, env_id, disable_env_checker=True, **env_kwargs)
            return _find_one_by_one(envs.single_observation_space, min(envs.num_envs, 2), make)
        watch = _Watch(envs.single_observation_space, (envs.num_envs,))
        _try_out(_WatchedVectorEnv(envs, watch), watch, seeded=engine not in UNSEEDED)
        return list(watch.found.values())


def _find_one_by_one(space: gym.Space[Any], num_envs: int, make: Callable[[], gym.Env]) -> list[Finding]:
    watch = _Watch(space, ())
    try:
        copies = SyncVectorEnv([lambda: _WatchedEnv(make(), watch)] * num_envs)
    except Exception as error:  # one that may exist only once, perhaps
        return [Finding(f"left out, since a copy of the environment to try out cannot be made: {brief(error)}", is_error=False)]
    try:
        times = _try_out(copies, watch, seeded=True)
        if times is not None and not times.masked:
            seconds = (GYMNASIUM_RESETS * times.reset + GYMNASIUM_STEPS * times.step) / num_envs
            if seconds < SECONDS:
                _gymnasium(copies.envs[0].env, watch)  # type: ignore[attr-defined]  # not watched
            else:
                watch.warn(
                    "slow", f"gymnasium's checker is left out: with {GYMNASIUM_RESETS} resets it would take {seconds:.1f} s"
                )
    finally:
        with contextlib.suppress(Exception):  # those that train are closed where it is seen
            copies.close()
        copies.closed = True  # gymnasium before 1.4 tries again, and prints what is raised, when they are collected
    return list(watch.found.values())


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

    def error(self, key: str, line: str) -> None:
        self.found.setdefault(key, Finding(line, is_error=True))

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
        result = self._call("step", call)
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
        return result

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            hint = "; wanted is reset(self, *, seed=None, options=None)" if "unexpected keyword" in str(error) else ""
            self.error("raises", f"{what} raised {brief(error)}{hint}")
            raise _RefusedError from error

    def _info(self, what: str, info: Any) -> None:
        if not isinstance(info, dict):
            self.error(
                "info", f"{what} returned {_told(info)} as info; it has to be a dict, {{}} where there is nothing to tell"
            )

    def _reward(self, reward: Any) -> None:
        array = _numbers(reward)
        if array is None:
            self.error("reward", f"reward is {_told(reward)}, not a number")
        elif array.shape != self.lead:
            self.error("reward", f"reward has shape {array.shape}; it has to be {self.lead or 'a number'}")
        elif not np.isfinite(array).all():
            self.error("reward", f"reward is not finite ({_first(array, ~np.isfinite(array))}) {self.when}")

    def _flag(self, name: str, value: Any) -> None:
        array = _numbers(value)
        if array is None or not ((array == 0) | (array == 1)).all():
            self.error(name, f"{name} is {_told(value)}, not True or False")
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
        array, expected = _numbers(leaf), (*self.lead, *(space.shape or ()))
        if array is None:
            self.error(name, f"{name} is {_told(leaf)}; its space is {_short(space)}")
        elif array.shape != expected:
            self.error(name, f"{name} has shape {array.shape}; its space, {_short(space)}, says {expected}")
        elif not np.isfinite(array).all():
            self.error(name, f"{name} is not finite ({_first(array, ~np.isfinite(array))}) {self.when}")
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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._watch.reset(lambda: self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        return self._watch.step(lambda: self.env.step(action))


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


def _try_out(envs: VectorEnv, watch: _Watch, seeded: bool) -> _Times | None:
    """Reset and step `envs`, which are watched; None where that had to be given up for an error."""
    try:
        return _resets_and_steps(AutoresetEnvs(envs), watch, seeded)
    except _RefusedError:
        return None
    except Exception as error:  # of the class that makes one environment of N
        watch.error("raises", f"{brief(error)} {watch.when}")
        return None


def _resets_and_steps(envs: AutoresetEnvs, watch: _Watch, seeded: bool) -> _Times:
    started = time.perf_counter()
    space = envs.envs.single_observation_space
    obs, mask = envs.reset_and_mask(SEED if seeded else None)
    reset_seconds = time.perf_counter() - started
    if seeded and reset_seconds < SECONDS:
        first = _arrays(obs, space)
        again = time.perf_counter()
        obs, mask = envs.reset_and_mask(SEED)
        reset_seconds = time.perf_counter() - again  # without what is made once
        if not all(map(np.array_equal, first, _arrays(obs, space))):
            watch.warn("seed", "reset with the same seed twice gave two different first observations: runs cannot be repeated")
        if envs.num_envs > 1 and _alike(first):
            _seeds_told_apart(envs, watch, first, started)
            obs, mask = envs.reset_and_mask(SEED)

    single = envs.envs.single_action_space
    actions = batch_space(single, envs.num_envs)
    actions.seed(SEED)
    rng = np.random.default_rng(SEED)
    done, masked, step_seconds = np.zeros(envs.num_envs, bool), False, 0.0
    for _ in range(STEPS):
        in_obs = obs.get("action_mask") if isinstance(obs, Mapping) else None
        legal = _numbers(mask if in_obs is None else in_obs)
        masked |= legal is not None
        action = actions.sample() if legal is None else _legal(single, legal.reshape(envs.num_envs, -1) != 0, done, rng, watch)
        like = next(_leaves(obs, space))
        if is_tensor(like):
            action = sys.modules["torch"].as_tensor(action, device=like.device)
        began = time.perf_counter()
        step = envs.step(action)
        step_seconds = max(step_seconds, time.perf_counter() - began)
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = (np.asarray(_numbers(x)) for x in (step.reward, step.terminated, step.truncated))
        if step.final_obs is not None:
            _Watch(space, (envs.num_envs,), watch.found, "at an end").obs(step.final_obs, space, "final observation")
            watch.refuse()
        ended = (terminated != 0) | (truncated != 0)
        if envs.mode is AutoresetMode.NEXT_STEP and (done & (ended | (reward != 0))).any():
            watch.warn(
                "autoreset",
                "the step after an end paid a reward or ended again: with autoreset_mode NEXT_STEP it only resets, and is not "
                "learned from; declare metadata['autoreset_mode'] SAME_STEP or DISABLED if that is what the class does",
            )
        done = ended & (envs.mode is AutoresetMode.NEXT_STEP)
        if time.perf_counter() - started > SECONDS:
            break
    return _Times(reset_seconds, step_seconds, masked)


def _seeds_told_apart(envs: AutoresetEnvs, watch: _Watch, first: list[NDArray[Any]], started: float) -> None:
    """All environments started alike: is it that they always start so, or that they share one seed?"""
    differs = False
    for seed in OTHER_SEEDS:
        if time.perf_counter() - started > SECONDS:
            return
        other = _arrays(envs.reset_and_mask(seed)[0], envs.envs.single_observation_space)
        if not _alike(other):
            return
        differs |= not all(map(np.array_equal, first, other))
    if differs:
        watch.warn(
            "alike", f"all {envs.num_envs} environments start alike whatever the seed: each needs random numbers of its own"
        )


def _alike(arrays: list[NDArray[Any]]) -> bool:
    """Whether all environments observe the same; arrays (N, ...)."""
    return all((array == array[:1]).all() for array in arrays)


def _legal(
    space: gym.Space[Any], mask: NDArray[np.bool_], done: NDArray[np.bool_], rng: np.random.Generator, watch: _Watch
) -> NDArray[Any]:
    """Random actions (N, *shape) among those that mask (N, A) allows; any where it allows none, as at an episode's end."""
    numbers = [int(n) for n in np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))]
    if isinstance(space, MultiBinary):
        numbers = [2] * int(np.prod(space.shape))
    parts = np.split(mask, np.cumsum(numbers)[:-1], axis=-1)
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
    return f"the environment raised {brief(error)} under its checker"


# --- numbers and words


def _numbers(value: Any) -> NDArray[Any] | None:
    """As an array on the host; None where it is not made of numbers."""
    if is_tensor(value):
        value = value.detach().cpu()
        return np.asarray((value.float() if value.dtype.itemsize == 2 and value.is_floating_point() else value).numpy())
    try:
        array = np.asarray(value)
    except Exception:
        return None
    return array if array.dtype.kind in "biuf" else None


def _leaves(obs: Any, space: gym.Space[Any]) -> Iterator[Any]:
    """Arrays or tensors of an observation that is in the form of its space."""
    if isinstance(space, Dict):
        for key, part in space.spaces.items():
            yield from _leaves(obs[key], part)
    elif isinstance(space, Tuple):
        for index, part in enumerate(space.spaces):
            yield from _leaves(obs[index], part)
    else:
        yield obs


def _arrays(obs: Any, space: gym.Space[Any]) -> list[NDArray[Any]]:
    """Copies: an environment may write its next observation where this one lies."""
    return [np.array(_numbers(leaf)) for leaf in _leaves(obs, space)]


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
