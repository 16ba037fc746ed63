"""The autoreset rule: what follows an episode's end, told in one way for every kind of vector environment.

A vector environment goes on after an episode's end in one of three ways (gymnasium's AutoresetMode):

- NEXT_STEP (gymnasium's default, EnvPool, ALE): step t returns the final observation; step t+1 ignores its action and
  returns the first observation of the next episode. Row t+1 is no transition, and its observation is the final one, so the
  value of row t+1 is the bootstrap of row t.
- SAME_STEP: step t itself returns the first observation of the next episode and puts the final one into its info.
- DISABLED: the caller resets. It is done at once here, which makes it SAME_STEP.

So a step is (obs, reward, terminated, truncated, final_obs): final_obs is None under NEXT_STEP, else it holds the final
observation in the rows of environments that ended. An environment of tensors is told in tensors: none becomes an array, and
under NEXT_STEP, or SAME_STEP with a dense final_obs, nothing waits for the device. An observation may be a dict or tuple of
batches. Two things are read from the info: `action_mask`, the actions that are legal next, and `game_over`, which ends are ends
of the whole game where an episode is one life of it. Knows nothing of rollouts or policies, and costs no torch where the
environment brings none.
"""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError

Batch = Any  # a numpy array or a torch tensor, as the environment has it
Structure = Any  # a batch, or a dict or tuple of such
ResetSeed = int | Sequence[int] | None  # several: one for each of the seeds of envs/seeds.py


class Step(NamedTuple):
    """What one vector step returned; leading axis N. All arrays, or all tensors."""

    obs: Structure
    reward: Batch
    terminated: Batch
    truncated: Batch
    final_obs: Structure | None
    action_mask: Batch | None = None  # (N, A): legal under `obs`; None where the info does not tell
    game_over: Batch | None = None  # (N,): the end is that of a game, not of one life; None where every end is


class AutoresetEnvs:
    """A gymnasium vector environment that is stepped by one rule, whatever its autoreset mode."""

    def __init__(self, envs: VectorEnv, deadline: Deadline = NO_DEADLINE) -> None:
        """`deadline` is for each step and reset. Closes `envs` and raises UsageError where they do not say how they reset."""
        mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        try:
            self.mode = AutoresetMode(mode)
        except ValueError:
            envs.close()
            raise UsageError(f"--env-id: the vector environment's autoreset_mode {mode!r} is not one of gymnasium's") from None
        self.envs = envs
        self.num_envs = envs.num_envs
        self.deadline = deadline
        self.closed = False

    @property
    def keeps_final_obs(self) -> bool:
        """True when steps carry `final_obs`: every row is then a transition."""
        return self.mode is not AutoresetMode.NEXT_STEP

    def reset(self, seed: ResetSeed) -> Structure:
        """First observations, (N, ...); None: the environments' random numbers go on where they are."""
        return self.reset_and_mask(seed)[0]

    def reset_and_mask(self, seed: ResetSeed) -> tuple[Structure, Batch | None]:
        """`reset`, and which actions are legal (see Step)."""
        with self.deadline:
            obs, info = self.envs.reset(seed=seed)  # type: ignore[arg-type]  # a list is for environments of many seeds
        return obs, self._mask(info)

    def step(self, action: Batch) -> Step:
        """Step all environments; see the module's docstring for what `final_obs` is."""
        with self.deadline:
            obs, reward, terminated, truncated, info = self.envs.step(action)
        mask, game_over = self._mask(info), info.get("game_over")
        if self.mode is AutoresetMode.NEXT_STEP:
            return Step(obs, reward, terminated, truncated, None, mask, game_over)
        done = np_or_torch(terminated).logical_or(terminated, truncated)
        if self.mode is AutoresetMode.SAME_STEP:
            final_obs = _final_obs(obs, done, info)
        elif done.any():  # sync: the caller resets
            # copies, since an environment may keep what it returned and write to it when it resets
            final_obs, reward, terminated, truncated = map(_copy, (obs, reward, terminated, truncated))
            game_over = None if game_over is None else _copy(game_over)
            with self.deadline:
                obs, info = self.envs.reset(options={"reset_mask": done})
            mask = _mask_after_reset(done, mask, self._mask(info))
        else:
            final_obs = obs
        return Step(obs, reward, terminated, truncated, final_obs, mask, game_over)

    def _mask(self, info: Mapping[str, Any]) -> Batch | None:
        """(N, A) of what the environments say is legal; all of an environment that says nothing."""
        mask = info.get("action_mask")
        if mask is None:
            return None
        if is_tensor(mask):
            return (mask != 0).reshape(self.num_envs, -1)
        told = np.asarray(info.get("_action_mask", np.ones(self.num_envs, bool)))
        if mask.dtype == object:  # a tuple of arrays, one for each component of the action
            parts = [_flat(row) if told[i] else None for i, row in enumerate(mask)]
            width = next(len(part) for part in parts if part is not None)
            mask = np.stack([np.ones(width, bool) if part is None else part for part in parts])
        mask = np.asarray(mask).reshape(self.num_envs, -1) != 0
        return mask if told.all() else np.where(told[:, None], mask, True)

    def close(self) -> None:
        """Release the environments' processes and windows. One that fails to close, as after a fault, is nothing to report."""
        if not self.closed:
            self.closed = True
            with contextlib.suppress(*ENVIRONMENT_ERRORS), self.deadline:
                self.envs.close()


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; torch is imported for nothing but one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def np_or_torch(batch: Batch) -> ModuleType:
    """The library whose functions `batch` is for."""
    return sys.modules["torch"] if is_tensor(batch) else np


def _flat(mask: Any) -> np.ndarray[Any, Any]:
    """The arrays of a tuple, or tuple of tuples, as one."""
    return np.concatenate([_flat(part) for part in mask]) if isinstance(mask, tuple | list) else np.ravel(mask)


def _mask_after_reset(done: Batch, step: Batch | None, reset: Batch | None) -> Batch | None:
    """What is legal in environments of which some have just been reset: the others' masks came with their step."""
    told = reset if step is None else step
    if told is None:
        return None
    library = np_or_torch(told)
    step, reset = (library.ones_like(told) if mask is None else mask for mask in (step, reset))
    return library.where(done[:, None], reset, step)


def _final_obs(obs: Structure, done: Batch, info: Mapping[str, Any]) -> Structure:
    """What each environment's step led to, under SAME_STEP."""
    final: Any = info.get("final_obs")
    if is_tensor(final) or isinstance(final, Mapping) or (isinstance(final, tuple) and isinstance(obs, tuple)):
        return _where(done, final, obs)  # of all environments, so that nobody has to ask which have ended
    rows = done.nonzero()
    indices = (rows if is_tensor(rows) else rows[0]).flatten().tolist()  # sync: objects lie on the host
    final_obs = _copy(obs) if indices else obs
    if indices and final is None:
        raise ValueError("an episode ended and there is no final_obs in the info, as autoreset within the step has it")
    for index in indices:
        _put(final_obs, index, final[index])
    return final_obs


def _where(done: Batch, final: Structure, obs: Structure) -> Structure:
    """Rows of `final` where an episode ended, else of `obs`."""
    if isinstance(obs, Mapping):
        return {name: _where(done, final[name], part) for name, part in obs.items()}
    if isinstance(obs, tuple):
        return tuple(_where(done, one, other) for one, other in zip(final, obs, strict=True))
    return np_or_torch(obs).where(done.reshape(-1, *[1] * (obs.ndim - 1)), final, obs)


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
