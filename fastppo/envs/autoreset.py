"""The autoreset rule: one form of step for vector environments of every autoreset mode.

A vector environment continues after an episode's end in one of three ways (gymnasium's AutoresetMode):

- NEXT_STEP (gymnasium's default, EnvPool, ALE): step t returns the final observation; step t+1 ignores its action and
  returns the first observation of the next episode. Row t+1 is no transition, and its observation is the final one, so the
  value of row t+1 is the bootstrap of row t.
- SAME_STEP: step t itself returns the first observation of the next episode and puts the final one into its info.
- DISABLED: the caller resets. `AutoresetEnvs` resets at once, which makes it SAME_STEP.

So a step is (obs, reward, terminated, truncated, final_obs): final_obs is None under NEXT_STEP, else it holds the final
observation in the rows of environments that ended. Tensors of an environment stay tensors, and under NEXT_STEP, or SAME_STEP
with a dense final_obs, nothing waits for the device. An observation may be a dict or tuple of batches. Of the info
`action_mask` is read, the actions that are legal next; environments may have `action_masks()` instead (envs/masks.py). So are
numbers to be logged, `info_names`. Knows nothing of rollouts or policies. Does not import torch unless the environment does.

An environment gives masks always or never: in the info of every reset and every step, except the last step of an episode. A
missing mask is an error, since training would otherwise ignore a forgotten one silently.
"""

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from fastppo.core.action_masks import flat_mask, mask_of
from fastppo.envs.agents import AgentRows
from fastppo.envs.atari import EpisodicLife
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.envs.masks import MaskSource, source_of
from fastppo.envs.numbered import REWARD_PARTS, SUCCESS, as_number
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, UsageError

Batch = Any  # a numpy array or a torch tensor, as the environment has it
Structure = Any  # a batch, or a dict or tuple of such
ResetSeed = int | Sequence[int] | None  # several: one for each of the seeds of envs/multi_seed_envs.py

# keys of a step's info where an episode ended in it and the environment has been reset; two of them are from gymnasium 0
FINAL_KEYS = frozenset({"final_obs", "final_observation", "final_info"})
UNDECLARED = (
    "the vector environment resets within the step (its info has {}) but does not say so: set "
    'metadata["autoreset_mode"] = AutoresetMode.SAME_STEP in its class'
)
HALF_MASKED = "{}: an environment with masks has to give one in the info of every reset and of every step"


class Step(NamedTuple):
    """The result of one vector step; leading axis N. All arrays, or all tensors."""

    obs: Structure
    reward: Batch
    terminated: Batch
    truncated: Batch
    final_obs: Structure | None
    action_mask: Batch | None = None  # (N, A): legal under `obs`, all True where an episode ended; None: there are no masks
    game_over: Batch | None = None  # (N,): the end is that of a whole episode, not of a life or agent in it; None: every end is
    reward_parts: Batch | None = None  # (N, K): the parts whose weighted sum is the reward; None where it is a number
    infos: Mapping[str, Batch] = MappingProxyType({})  # (N,) each: numbers in the info by name; nan where there is none


class AutoresetEnvs:
    """A gymnasium vector environment with the same form of step in every autoreset mode."""

    def __init__(self, envs: VectorEnv, deadline: Deadline = NO_DEADLINE, info_names: Sequence[str] = (SUCCESS,)) -> None:
        """`deadline` is for each step and reset. Closes `envs` and raises UsageError where they do not say how they reset.

        info_names: of numbers to be read from the info.
        """
        mode = envs.metadata.get("autoreset_mode")
        self.is_declared = mode is not None
        try:
            self.mode = AutoresetMode(AutoresetMode.NEXT_STEP if mode is None else mode)
        except ValueError:
            envs.close()
            raise UsageError(
                f"--env-id: the vector environment's autoreset_mode {mode!r} is not one of gymnasium's: use "
                "AutoresetMode.NEXT_STEP, SAME_STEP or DISABLED"
            ) from None
        self.envs = envs
        self.num_envs = envs.num_envs
        self.deadline = deadline
        self.closed = False
        self.closing = contextlib.ExitStack()  # what else to close, after the environments
        self.info_names = tuple(info_names)
        self._lives = _lives_of(envs)
        self._rows = envs if isinstance(envs, AgentRows) else None
        self._is_new = True  # until the first reset, which decides whether there are masks
        self._mask_size: int | None = None  # A; None: there are no masks
        self._mask_source: MaskSource | None = None

    @property
    def keeps_final_obs(self) -> bool:
        """True when steps carry `final_obs`: every row is then a transition."""
        return self.mode is not AutoresetMode.NEXT_STEP

    @property
    def num_agents(self) -> int:
        """A; rows n * A to (n + 1) * A - 1 are the agents of one environment."""
        return 1 if self._rows is None else self._rows.num_agents

    @property
    def acting(self) -> Batch | None:
        """(N,) bool after a reset or step, the rows whose next step is a transition; None: all but those that only reset."""
        return None if self._rows is None else self._rows.acting

    def reset(self, seed: ResetSeed) -> Structure:
        """First observations, (N, ...); None: the environments' random numbers go on where they are."""
        return self.reset_and_mask(seed)[0]

    def reset_and_mask(self, seed: ResetSeed) -> tuple[Structure, Batch | None]:
        """`reset`, and which actions are legal (see Step). Raises EnvironmentFailed where only some environments say that."""
        with self.deadline:
            obs, info = self.envs.reset(seed=seed)  # type: ignore[arg-type]  # a list is for environments of many seeds
            if self._is_new:
                self._mask_source = source_of(self.envs)
            mask = self._mask(info, np.zeros(self.num_envs, bool), "reset")
        self._is_new = False
        return obs, mask

    def step(self, action: Batch) -> Step:
        """Step all environments; see the module's docstring for what `final_obs` is.

        Raises EnvironmentFailed for a missing mask, for a mask after a first reset without one, and for environments that reset
        within the step without declaring it.
        """
        with self.deadline:
            return self._step_of(self.envs.step(action))

    def step_async(self, action: Batch) -> None:
        """Begin a step of environments whose step is in two parts (envs/halves.py)."""
        with self.deadline:
            self.envs.step_async(action)  # type: ignore[attr-defined]

    def step_wait(self) -> Step:
        """Wait for its end: what `step` returns and raises."""
        with self.deadline:
            return self._step_of(self.envs.step_wait())  # type: ignore[attr-defined]

    def _step_of(self, result: tuple[Structure, Batch, Batch, Batch, dict[str, Any]]) -> Step:
        obs, reward, terminated, truncated, info = result
        game_over = None if self._lives is None else self._lives.game_over
        game_over = game_over if self._rows is None else self._rows.over
        if not self.is_declared and not FINAL_KEYS.isdisjoint(info):
            raise EnvironmentFailed(UNDECLARED.format(next(key for key in info if key in FINAL_KEYS)))
        done: Any = None
        if self.keeps_final_obs or self._mask_size or self._mask_source or "action_mask" in info:
            done = np_or_torch(terminated).logical_or(terminated, truncated)
        if self.mode is AutoresetMode.SAME_STEP:  # what has ended is reset already
            mask = self._mask(info, np.zeros(self.num_envs, bool), "step")
            final_obs = _final_obs(obs, done, info)
            infos = numbers_in(info.get("final_info", info), self.info_names, self.num_envs)
            return Step(obs, reward, terminated, truncated, final_obs, mask, game_over, info.get(REWARD_PARTS), infos)
        mask, infos = self._mask(info, done, "step"), numbers_in(info, self.info_names, self.num_envs)
        if self.mode is AutoresetMode.NEXT_STEP:
            return Step(obs, reward, terminated, truncated, None, mask, game_over, info.get(REWARD_PARTS), infos)
        final_obs = obs
        if done.any():  # sync: the caller resets
            # copies, since an environment may keep what it returned and write to it when it resets
            final_obs, reward, terminated, truncated = map(_copy, (obs, reward, terminated, truncated))
            with self.deadline:
                obs, info = self.envs.reset(options={"reset_mask": done})
                after = self._mask(info, ~done, "reset")
            mask = None if mask is None else np_or_torch(mask).where(done[:, None], after, mask)
        return Step(obs, reward, terminated, truncated, final_obs, mask, game_over, infos=infos)

    def _mask(self, info: Mapping[str, Any], unneeded: Batch, when: str) -> Batch | None:
        """(N, A) bool, the legal actions; None: there are no masks.

        unneeded: (N,) bool, environments that may give none, as their next action is ignored; None where there are no masks.
        when: "reset" or "step", for messages.
        """
        given: Any = info.get("action_mask")
        if given is None and self._mask_source is None and self._mask_size is None:
            return None
        if is_tensor(given):
            mask, gives = (given != 0).reshape(self.num_envs, -1), None
        else:
            unneeded = np.asarray(unneeded.cpu() if is_tensor(unneeded) else unneeded)
            mask, gives = self._masks_given(info, unneeded)
            if not gives.any() and self._mask_size is None:  # `action_masks()` returns None, always
                return None
        if not self._is_new and self._mask_size is None:
            raise EnvironmentFailed(HALF_MASKED.format(f"an action_mask after a {when}, and none after the first reset"))
        if gives is not None and not gives.all():
            missing = ~(gives | unneeded)
            if missing.any():
                raise EnvironmentFailed(HALF_MASKED.format(f"no action_mask of environment {missing.argmax()} after a {when}"))
            mask = (
                np.ones((self.num_envs, self._mask_size or 0), bool) if mask is None else np.where(gives[:, None], mask, True)
            )
        self._mask_size = mask.shape[1]
        return mask

    def _masks_given(self, info: Mapping[str, Any], unneeded: Batch) -> tuple[Batch | None, Batch]:
        """Masks (N, A) bool, None if no environment gave one; and which environments gave one, (N,) bool."""
        given: Any = info.get("action_mask")
        gives, space = np.zeros(self.num_envs, bool), self.envs.single_action_space
        if given is not None:
            gives = np.asarray(info.get("_action_mask", ~gives))
        if isinstance(given, Mapping):
            given = [mask_of(given, space, index) if one else None for index, one in enumerate(gives)]
        if self._mask_source is not None and not (gives | unneeded).all():
            given = self._mask_source(unneeded)
            given = given.cpu().numpy() if is_tensor(given) else given
            gives = gives & False if given is None else np.array([mask is not None for mask in given])
        if not gives.any():
            return None, gives
        if not isinstance(given, np.ndarray) or given.dtype == object:  # lists, or tuples of an array for each component
            rows = [flat_mask(mask, space) if one else None for mask, one in zip(given, gives, strict=True)]
            like = next(row for row in rows if row is not None)
            given = np.stack([np.ones_like(like) if row is None else row for row in rows])
        return given.reshape(self.num_envs, -1) != 0, gives

    def close(self) -> None:
        """Release the environments' processes and windows. Errors while closing are dropped: a fault may have caused them."""
        if not self.closed:
            self.closed = True
            with self.closing, contextlib.suppress(*ENVIRONMENT_ERRORS), self.deadline:
                self.envs.close()


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def np_or_torch(batch: Batch) -> ModuleType:
    """numpy for an array, torch for a tensor."""
    return sys.modules["torch"] if is_tensor(batch) else np


def _lives_of(envs: VectorEnv) -> EpisodicLife | None:
    """The wrapper that says which ends are ends of a game, if an episode is one life; else None."""
    while isinstance(envs, VectorWrapper):
        if isinstance(envs, EpisodicLife):
            return envs
        envs = envs.env
    return None


def _final_obs(obs: Structure, done: Batch, info: Mapping[str, Any]) -> Structure:
    """The observation that each environment's step led to, under SAME_STEP."""
    final: Any = info.get("final_obs", info.get("final_observation"))  # the latter is gymnasium 0's name
    if is_tensor(final) or isinstance(final, Mapping) or (isinstance(final, tuple) and isinstance(obs, tuple)):
        return _where(done, final, obs)  # of all environments, so nothing waits for the device
    rows = done.nonzero()
    indices = (rows if is_tensor(rows) else rows[0]).flatten().tolist()  # sync: objects lie on the host
    final_obs = _copy(obs) if indices else obs
    for index in indices:
        if final is None or final[index] is None:
            raise EnvironmentFailed(
                f"environment {index}: an episode ended and its final_obs is not in the info, as autoreset_mode SAME_STEP asks"
            )
        _put(final_obs, index, final[index])
    return final_obs


def _where(done: Batch, final: Structure, obs: Structure) -> Structure:
    """Rows of `final` where an episode ended, else of `obs`."""
    if isinstance(obs, Mapping):
        return {name: _where(done, final[name], part) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_where(done, one, other) for one, other in zip(final, obs, strict=True))
    return np_or_torch(obs).where(done.reshape(-1, *[1] * (obs.ndim - 1)), final, obs)


def numbers_in(info: Any, names: Sequence[str], size: int) -> dict[str, Batch]:
    """The numbers under these names in the info of a step, (N,) each; nan where an environment gave none."""
    found: dict[str, Batch] = {}
    if not isinstance(info, Mapping) or not info:
        return found
    for name in (name for name in names if name in info):
        numbers, given = _numbers_of(info[name], size), info.get(f"_{name}")
        if numbers is not None and given is not None:
            given = sys.modules["torch"].as_tensor(given, device=numbers.device) if is_tensor(numbers) else given
            numbers = np_or_torch(numbers).where(given, numbers, math.nan)
        if numbers is not None:
            found[name] = numbers
    return found


def _numbers_of(batch: Any, size: int) -> Batch | None:
    """A batch of an info as floats (N,); None: it does not hold a number for each environment."""
    if is_tensor(batch):
        return batch.reshape(size).float() if batch.numel() == size else None
    if not isinstance(batch, Sequence | np.ndarray) or isinstance(batch, str) or len(batch) != size:
        return None
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biuf" and batch.size == size:
        return batch.reshape(size).astype(np.float64)
    numbers = [as_number(value) for value in batch]
    if all(number is None for number in numbers):
        return None
    return np.array([math.nan if number is None else number for number in numbers])


def _copy(obs: Structure) -> Structure:
    if isinstance(obs, Mapping):
        return {name: _copy(part) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_copy(part) for part in obs)
    return obs.clone() if is_tensor(obs) else np.array(obs)


def _put(obs: Structure, index: int, row: Structure) -> None:
    """Write one environment's observation into its row."""
    if isinstance(obs, Mapping):
        for name, part in obs.items():
            _put(part, index, row[name])
    elif isinstance(obs, tuple):
        for part, value in zip(obs, row, strict=True):
            _put(part, index, value)
    else:
        obs[index] = sys.modules["torch"].as_tensor(row, device=obs.device) if is_tensor(obs) else row
