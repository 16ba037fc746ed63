"""Check that a vector environment does at an episode's end what its autoreset mode says. A part of envs/check.py.

It looks for two faults. Under SAME_STEP: a final observation that the reset has overwritten. Where the metadata has no
autoreset_mode, so that NEXT_STEP is assumed: an action that counts in the step after an end, where NEXT_STEP ignores it. Knows
nothing of policies or learning. Does not import torch unless the environment does.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict, Tuple
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.envs.autoreset import AutoresetEnvs, Step, is_tensor

OVERWRITTEN = (
    "final_obs is overwritten: at an episode's end it holds the next episode's first observation, as both are one buffer; "
    "copy it before the reset"
)
ACTION_COUNTS = (
    "the action of the step after an end changes what that step returns: without an autoreset_mode NEXT_STEP is taken, which "
    'ignores that action; set metadata["autoreset_mode"] in the class: AutoresetMode.SAME_STEP if step itself resets, DISABLED '
    "if nothing does"
)
NOT_DECLARED = (
    'its class has no metadata["autoreset_mode"], so NEXT_STEP is taken, where the step after an end only resets; the check '
    "could not try that: set the key, to AutoresetMode.SAME_STEP if step itself resets"
)


class FinalObs:
    """Checks the final observations of a SAME_STEP environment, step by step."""

    def __init__(self, space: gym.Space[Any]) -> None:
        """space: of one observation."""
        self.space = space
        self._kept: list[tuple[Any, NDArray[Any]]] = []  # final observations of the last step, and copies of then
        self._equal = self._ends = 0
        self._moves = False  # whether observations change within an episode
        self._last: list[NDArray[Any]] = []

    def look(self, obs: Any, info: dict[str, Any], ended: NDArray[np.bool_]) -> str | None:
        """Return a line if a final observation is certainly overwritten.

        Args:
            obs, info: as the step returned them.
            ended: (N,), whose episode ended in the step.
        """
        if any(_differ(leaf, copy) for leaf, copy in self._kept):
            return OVERWRITTEN
        self._kept = []
        batches, arrays = list(leaves(obs, self.space)), arrays_of(obs, self.space)
        self._moves |= not ended.any() and any(map(_differ, self._last, arrays))
        self._last = arrays
        final = info.get("final_obs", info.get("final_observation"))
        for index in np.flatnonzero(ended).tolist() if final is not None else ():
            rows = _row(final, index, self.space)
            if any(_share_memory(row, batch[index]) for row, batch in zip(rows, batches, strict=True)):
                return OVERWRITTEN
            self._ends += 1
            if not any(_differ(row, array[index]) for row, array in zip(rows, arrays, strict=True)):
                self._equal += 1
                self._kept += [(row, np.array(numbers(row))) for row in rows]
        return None

    def suspicion(self) -> str | None:
        """Return a line if all final observations equal the next first ones, which may have another reason."""
        if self._moves and self._equal == self._ends >= 2:
            return f"final_obs equals the next episode's first observation in all {self._ends} ends: is it overwritten?"
        return None


class NextAction:
    """Repeats an episode of a vector environment, to see whether the action after an end counts."""

    def __init__(self, envs: AutoresetEnvs) -> None:
        self.envs = envs
        self.space = envs.envs.single_observation_space
        self._actions: list[Any] = []  # of each step, as sampled
        self._after: list[NDArray[Any]] | None = None  # what the step after the first end returned
        self._env = 0  # whose end it was

    @property
    def is_known(self) -> bool:
        """Whether a step after an end was seen."""
        return self._after is not None

    def look(self, action: Any, step: Step, done: NDArray[np.bool_]) -> None:
        """Record a step with `action`; done: (N,) whose episode ended in the step before."""
        if self._after is None:
            self._actions.append(action)
            if done.any():
                self._env = int(done.argmax())
                self._after = self._result(step)

    def counts(self, seed: int, seconds: float) -> bool:
        """Whether the action counts. False also if nothing ended, if a seed does not repeat, or if it takes over `seconds`."""
        if self._after is None:
            return False
        *before, last = self._actions
        began = time.perf_counter()
        again = self._play(seed, [*before, last])
        if any(map(_differ, again, self._after)) or time.perf_counter() - began > seconds / 2:
            return False
        return any(map(_differ, self._play(seed, [*before, self._another(last)]), again))

    def _play(self, seed: int, actions: Sequence[Any]) -> list[NDArray[Any]]:
        obs = self.envs.reset(seed)
        like = next(leaves(obs, self.space))
        for action in actions:
            step = self.envs.step(action_like(action, like))
        return self._result(step)

    def _result(self, step: Step) -> list[NDArray[Any]]:
        rest = [np.array(numbers(x)) for x in (step.reward, step.terminated, step.truncated)]
        return [array[self._env] for array in (*arrays_of(step.obs, self.space), *rest)]

    def _another(self, action: Any) -> Any:
        """The same actions with another one for the environment that ended, if its space has another."""
        single = self.envs.envs.single_action_space
        space = batch_space(single, self.envs.num_envs)
        space.seed(1)
        changed = copy.deepcopy(action)
        for _ in range(16):
            for to, sampled in zip(leaves(changed, single), leaves(space.sample(), single), strict=True):
                to[self._env] = sampled[self._env]
            if any(map(_differ, leaves(changed, single), leaves(action, single))):
                break
        return changed


def action_like(action: Any, like: Any) -> Any:
    """Sampled actions as a tensor on the device of `like` if `like` is a tensor."""
    if isinstance(action, Mapping):
        return {name: action_like(part, like) for name, part in action.items()}
    if isinstance(action, tuple):
        return tuple(action_like(part, like) for part in action)
    if is_tensor(like):
        import torch

        return torch.as_tensor(action, device=like.device)
    return action


def numbers(value: Any) -> NDArray[Any] | None:
    """`value` as an array on the host; None if it is not made of numbers."""
    if is_tensor(value):
        value = value.detach().cpu()
        return np.asarray((value.float() if value.dtype.itemsize == 2 and value.is_floating_point() else value).numpy())
    try:
        array = np.asarray(value)
    except Exception:
        return None
    return array if array.dtype.kind in "biuf" else None


def leaves(obs: Any, space: gym.Space[Any]) -> Iterator[Any]:
    """The arrays or tensors in an observation that has the form of its space."""
    if isinstance(space, Dict):
        for key, part in space.spaces.items():
            yield from leaves(obs[key], part)
    elif isinstance(space, Tuple):
        for index, part in enumerate(space.spaces):
            yield from leaves(obs[index], part)
    else:
        yield obs


def arrays_of(obs: Any, space: gym.Space[Any]) -> list[NDArray[Any]]:
    """Copies of an observation's arrays, since an environment may overwrite them with the next observation."""
    return [np.array(numbers(leaf)) for leaf in leaves(obs, space)]


def _row(final: Any, index: int, space: gym.Space[Any]) -> list[Any]:
    """Leaves of one environment's final observation; `final` is a list of observations or a structure of batches."""
    if isinstance(final, list) or (isinstance(final, np.ndarray) and final.dtype == object):
        return list(leaves(final[index], space))
    return [batch[index] for batch in leaves(final, space)]


def _differ(one: Any, other: Any) -> bool:
    return not np.array_equal(np.asarray(numbers(one)), np.asarray(numbers(other)))


def _share_memory(one: Any, other: Any) -> bool:
    if is_tensor(one) and is_tensor(other):
        return one.numel() > 0 and one.data_ptr() == other.data_ptr()
    return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.shares_memory(one, other)
