"""Environments in one process, each with a number: `--vectorization sync`, and each group of `grouped` and `async`.

An environment that fails is named by its number. Does not import torch.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Dict, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo.core.action_masks import flat_mask
from fastppo.envs.agents import AGENT_INFOS
from fastppo.envs.masks import masks_of, owner_of
from fastppo.errors import ENVIRONMENT_ERRORS, EnvironmentFailed, NoAnswer, located

EnvFn = Callable[[], gym.Env[Any, Any]]

REWARD_PARTS = "fastppo_reward_parts"  # (K,) the parts of a vector reward (envs/wrappers.py)
# The infos that are read (envs/autoreset.py). Gathering others would take time, a seventh of a step for HalfCheetah's.
INFO_KEYS = ("action_mask", REWARD_PARTS)
ONLY_SOME = "if only one can be made in a process: --num-envs 1"  # a note of the error where the first could be made
SUCCESS = "is_success"  # in the info of an episode's last step, as robotics environments have it


class NumberedVectorEnv(SyncVectorEnv):  # before gymnasium 1.4 it takes no type arguments
    """Gymnasium's SyncVectorEnv for environments first, first + 1, ...; it names the one that fails, and copies less.

    Returned observations are reused in the next step, so copy what you keep. Of infos, only INFO_KEYS are returned; of an
    episode's last step also the numbers under `info_names`; and under SAME_STEP `final_obs`, (N,) objects.
    """

    def __init__(
        self,
        env_fns: Sequence[EnvFn],
        first: int = 0,
        mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        info_names: Sequence[str] = (SUCCESS,),
    ) -> None:
        """Make the environments; `first` is the number of env_fns[0]. If making one raises, the others are closed."""
        made: list[NumberedEnv] = []
        self.info_names = tuple(info_names)
        self._is_same_step = mode is AutoresetMode.SAME_STEP

        def make(env_fn: EnvFn, number: int) -> NumberedEnv:
            made.append(NumberedEnv.make(env_fn, number))
            return made[-1]

        try:
            super().__init__(
                [partial(make, env_fn, first + i) for i, env_fn in enumerate(env_fns)], copy=False, autoreset_mode=mode
            )
        except BaseException as error:
            if 0 < len(made) < len(env_fns):
                error.add_note(ONLY_SOME)
            for env in made:
                with contextlib.suppress(*ENVIRONMENT_ERRORS):
                    env.close()
            raise

    def _add_info(self, vector_infos: dict[str, Any], env_info: dict[str, Any], env_num: int) -> dict[str, Any]:
        if not env_info:
            return vector_infos
        if self._is_same_step and "final_info" in env_info:  # of the last step; the info after the reset follows
            final = vector_infos.setdefault("final_obs", np.full(self.num_envs, None, object))
            final[env_num] = deepcopy(env_info["final_obs"])  # an environment may write its next one to the same memory
            info = env_info["final_info"]
            read = {key: value for key, value in info.items() if key == REWARD_PARTS} | self._numbers(info)
        else:
            read = {key: env_info[key] for key in INFO_KEYS if key in env_info}
            if not self._is_same_step and (self._terminations[env_num] or self._truncations[env_num]):
                read |= self._numbers(env_info)
        return super()._add_info(vector_infos, read, env_num) if read else vector_infos

    def _numbers(self, info: Mapping[str, Any]) -> dict[str, float]:
        """The numbers under `info_names` in the info of an episode's last step."""
        return {name: number for name in self.info_names if (number := _number_in(info, name)) is not None}

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments, once: gymnasium before 1.4 tries again, and prints what is raised, when this is collected."""
        self.closed = True
        super().close_extras(**kwargs)


def _number_in(info: Mapping[str, Any], name: str) -> float | None:
    """The number under this name in an info; of several agents the mean over those that have it. None: there is none."""
    if (number := as_number(info.get(name))) is not None or AGENT_INFOS not in info:
        return number
    numbers = [number for own in info[AGENT_INFOS].values() if (number := as_number(own.get(name))) is not None]
    return sum(numbers) / len(numbers) if numbers else None


def as_number(value: Any) -> float | None:
    """A bool, number, or array or tensor of one number as a float; None: it is something else."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return float(value)
    if getattr(value, "shape", None) in ((), (1,)) and not isinstance(value, np.str_):
        with contextlib.suppress(TypeError, ValueError):
            return float(value.item())
    return None


class NumberedEnv(gym.Wrapper[Any, Any, Any, Any]):
    """An environment whose errors have its number, and whose info has the result of `action_masks()` (envs/masks.py).

    A mask in parts becomes one array.
    """

    def __init__(self, env: gym.Env[Any, Any], number: int) -> None:
        super().__init__(env)
        self.metadata = dict(env.metadata)  # before gymnasium 1.4 SyncVectorEnv writes to it, and it is its class's
        self.number = number
        self._masks = owner_of(env)  # None: it has none
        self._has_parts = isinstance(env.action_space, Dict | Tuple)

    @classmethod
    def make(cls, env_fn: EnvFn, number: int) -> "NumberedEnv":
        try:
            return cls(env_fn(), number)
        except NoAnswer as error:  # other errors pass: their type says which flag is wrong
            raise EnvironmentFailed(f"environment {number}: {located(error)}") from error

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            obs, info = self.env.reset(**kwargs)
            return obs, self._with_mask(info)
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {located(error)}") from error

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        try:
            if self._masks is None and not self._has_parts:
                return self.env.step(action)
            obs, reward, terminated, truncated, info = self.env.step(action)
            # no action follows an episode's last observation, and its mask may allow nothing
            return obs, reward, terminated, truncated, self._with_mask(info, is_last=bool(terminated or truncated))
        except ENVIRONMENT_ERRORS as error:
            raise EnvironmentFailed(f"environment {self.number}: {located(error)}") from error

    def _with_mask(self, info: dict[str, Any], is_last: bool = False) -> dict[str, Any]:
        mask = info.get("action_mask")
        if mask is None and self._masks is not None and not is_last:
            mask = masks_of(self._masks)
        if mask is None or (mask is info.get("action_mask") and not isinstance(mask, Mapping | tuple | list)):
            return info
        return {**info, "action_mask": flat_mask(mask, self.env.action_space) if self._has_parts else mask}
