"""Is what one reset or step returns legal? The first part of envs/check.py: forms, shapes, types, bounds and finite numbers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from fastppo.envs.autoreset import is_tensor
from fastppo.envs.check_ends import numbers
from fastppo.errors import UsageError, located, shown_place

FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Finding:
    """One fault of an environment."""

    line: str
    is_error: bool  # else a warning; see envs/check.py
    trains: bool = False  # an error that --no-check-env can train with


class RefusedError(Exception):
    """There is an error among the findings, so that the check cannot continue."""


@dataclass
class CallChecker:
    """Checks what the resets and steps of an environment return, and collects the findings."""

    space: gym.Space[Any]  # of one observation
    lead: tuple[int, ...]  # () for one environment, (N,) for a vector environment
    found: dict[str, Finding] = field(default_factory=dict)  # the first finding of each kind and place
    when: str = ""
    last: Any = None  # the result of the last step
    seconds: list[float] = field(default_factory=list)  # of each step
    cpu_seconds: list[float] = field(default_factory=list)  # of this process in each step
    signature: str = "reset(self, *, seed=None, options=None)"  # required of reset, and where reset is defined

    def error(self, key: str, line: str, trains: bool = False) -> None:
        self.found.setdefault(key, Finding(line, is_error=True, trains=trains))

    def warn(self, key: str, line: str) -> None:
        self.found.setdefault(key, Finding(line, is_error=False))

    def refuse(self) -> None:
        """Raise RefusedError if there is an error among the findings."""
        if any(finding.is_error for finding in self.found.values()):
            raise RefusedError

    def reset(self, call: Callable[[], Any]) -> Any:
        """Check and return the result of `call()`, a reset."""
        self.when = "after a reset"
        result = self._call("reset", call)
        if not isinstance(result, tuple) or len(result) != 2:
            self.error("reset", f"reset returned {describe(result)}; it has to return two values, observation and info")
        self.refuse()
        obs, info = result
        self._info("reset", info)
        self.obs(obs, self.space, "observation")
        self.refuse()
        return result

    def step(self, call: Callable[[], Any]) -> Any:
        """Check and return the result of `call()`, a step."""
        self.when = "after a step"
        began, cpu_began = time.perf_counter(), time.process_time()
        result = self._call("step", call)
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)
        if not isinstance(result, tuple) or len(result) != 5:
            self.error(
                "step",
                f"step returned {describe(result)}; it has to return five: observation, reward, terminated, truncated, info",
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
            ours = isinstance(error, UsageError)  # of a wrapper, and names its flag
            self.error("raises", str(error) if ours else f"{what} raised {located(error)}{hint}")
            raise RefusedError from error

    def _info(self, what: str, info: Any) -> None:
        if not isinstance(info, dict):
            self.error("info", f"{what} returned {describe(info)} as info; it has to be a dict, {{}} where it is empty")

    def _reward(self, reward: Any) -> None:
        array = numbers(reward)
        if array is None:
            self.error("reward", f"reward is {describe(reward)}, not a number")
        elif array.shape != self.lead:
            line = f"reward has shape {array.shape}; it has to be {self.lead or 'a number'}"
            if array.ndim == 1 and len(array) and not self.lead:
                what = "the sum of its parts" if len(array) > 1 else "the number in it"
                line += f": --reward-weights{' 1' * len(array)} trains on {what}"
            self.error("reward", line)
        elif (unusable := _unusable(array)) is not None:
            self.error("reward", f"reward {unusable} {self.when}")

    def _flag(self, name: str, value: Any) -> None:
        array = numbers(value)
        if array is None or not ((array == 0) | (array == 1)).all():
            self.error(name, f"{name} is {describe(value)}, not True or False", trains=value is None or array is not None)
        elif array.shape != self.lead:
            self.error(name, f"{name} has shape {array.shape}; it has to be {self.lead or 'a bool'}")
        elif array.dtype != bool:
            self.warn(name, f"{name} is {describe(value)}; expected a bool")

    def obs(self, obs: Any, space: gym.Space[Any], name: str) -> None:
        """Check that an observation is in its space, with the axes of `lead` in front."""
        if isinstance(space, Dict):
            if not isinstance(obs, Mapping) or set(obs) != set(space.spaces):
                has = f"has the keys {', '.join(map(str, obs))}" if isinstance(obs, Mapping) else f"is {describe(obs)}"
                self.error(name, f"{name} {has}; its space is a Dict of {', '.join(space.spaces)}")
                return
            for key, part in space.spaces.items():
                self.obs(obs[key], part, f"{name}[{key!r}]")
        elif isinstance(space, Tuple):
            if not isinstance(obs, tuple | list) or len(obs) != len(space.spaces):
                self.error(name, f"{name} is {describe(obs)}; its space is a Tuple of {len(space.spaces)}")
                return
            for index, part in enumerate(space.spaces):
                self.obs(obs[index], part, f"{name}[{index}]")
        else:
            self._leaf(obs, space, name)

    def _leaf(self, leaf: Any, space: gym.Space[Any], name: str) -> None:
        array, expected = numbers(leaf), (*self.lead, *(space.shape or ()))
        if array is None:
            self.error(name, f"{name} is {describe(leaf)}; its space is {_short(space)}")
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


class CheckedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """One environment whose calls are checked."""

    def __init__(self, env: gym.Env[Any, Any], checker: CallChecker) -> None:
        super().__init__(env)
        self.metadata = dict(env.metadata)  # before gymnasium 1.4 SyncVectorEnv writes to it, and it is its class's
        self._checker = checker
        code = getattr(getattr(env.unwrapped, "reset", None), "__code__", None)
        if code is not None:
            checker.signature += f" at {shown_place(code.co_filename, code.co_firstlineno)}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._checker.reset(lambda: self.env.reset(seed=seed, options=options))

    def step(self, action: Any) -> Any:
        return self._checker.step(lambda: self.env.step(action))


class CheckedVectorEnv(VectorWrapper):
    """A vector environment whose calls are checked."""

    def __init__(self, env: VectorEnv, checker: CallChecker) -> None:
        super().__init__(env)
        self._checker = checker

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return self._checker.reset(lambda: self.env.reset(seed=seed, options=options))

    def step(self, actions: Any) -> Any:
        return self._checker.step(lambda: self.env.step(actions))


def _bounds_of(space: gym.Space[Any]) -> tuple[Any, Any]:
    """The least and the greatest legal values, inclusive."""
    if isinstance(space, Box):
        if space.dtype.kind != "f":
            return space.low, space.high
        # EnvPool uses C++'s min() for the lowest number, but that is the smallest number above 0
        return np.where(space.low == np.finfo(space.dtype).tiny, -np.inf, space.low), space.high
    if isinstance(space, Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1


def _unusable(array: NDArray[Any]) -> str | None:
    """Why training, in float32, cannot use these numbers; None: it can."""
    for wrong, what in ((~np.isfinite(array), "is not finite"), (np.abs(array) > FLOAT32_MAX, "is too large for float32")):
        if wrong.any():
            return f"{what} ({_first(array, wrong)})"
    return None


def _first(array: NDArray[Any], where: NDArray[np.bool_]) -> str:
    """The first of the numbers where `where` is True, as text."""
    return f"{array[where].flat[0]:g}"


def describe(value: Any) -> str:
    """Short description of a value, for findings."""
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
