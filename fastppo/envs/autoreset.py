"""The autoreset rule: what follows an episode's end, told in one way for every kind of vector environment.

A vector environment goes on after an episode's end in one of three ways (gymnasium's AutoresetMode):

- NEXT_STEP (gymnasium's default, EnvPool, ALE): step t returns the final observation; step t+1 ignores its action and
  returns the first observation of the next episode. Row t+1 is no transition, and its observation is the final one, so the
  value of row t+1 is the bootstrap of row t.
- SAME_STEP: step t itself returns the first observation of the next episode and puts the final one into its info.
- DISABLED: the caller resets. It is done at once here, which makes it SAME_STEP.

So a step is (obs, reward, terminated, truncated, final_obs): final_obs is None under NEXT_STEP, else it holds the final
observation in the rows of environments that ended. Knows nothing of rollouts or policies.
"""

from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from fastppo.errors import UsageError

Array = NDArray[Any]


class Step(NamedTuple):
    """What one vector step returned; leading axis N."""

    obs: Array
    reward: Array
    terminated: Array
    truncated: Array
    final_obs: Array | None


class AutoresetEnvs:
    """A gymnasium vector environment that is stepped by one rule, whatever its autoreset mode."""

    def __init__(self, envs: VectorEnv) -> None:
        """Raises UsageError where the environment does not say how it resets."""
        mode = envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
        try:
            self.mode = AutoresetMode(mode)
        except ValueError:
            raise UsageError(f"--env-id: the vector environment's autoreset_mode {mode!r} is not one of gymnasium's") from None
        self.envs = envs
        self.num_envs = envs.num_envs

    @property
    def keeps_final_obs(self) -> bool:
        """True when steps carry `final_obs`: every row is then a transition."""
        return self.mode is not AutoresetMode.NEXT_STEP

    def reset(self, seed: int | None) -> Array:
        """First observations, (N, ...); None: the environments' random numbers go on where they are."""
        obs: Array = self.envs.reset(seed=seed)[0]
        return obs

    def step(self, action: Array) -> Step:
        """Step all environments; see the module's docstring for what `final_obs` is."""
        obs, reward, terminated, truncated, info = self.envs.step(action)
        if self.mode is AutoresetMode.NEXT_STEP:
            return Step(obs, reward, terminated, truncated, None)
        done = np.logical_or(terminated, truncated)
        final_obs = obs
        if done.any():
            final_obs = np.array(obs)
            if self.mode is AutoresetMode.SAME_STEP:
                for index in np.flatnonzero(done):
                    final_obs[index] = info["final_obs"][index]
            else:
                obs = self.envs.reset(options={"reset_mask": done})[0]
        return Step(obs, reward, terminated, truncated, final_obs)

    def close(self) -> None:
        """Release the environments' processes and windows."""
        self.envs.close()
