"""The autoreset rule: what follows an episode's end, told in one way for every kind of vector environment.

A vector environment goes on after an episode's end in one of three ways (gymnasium's AutoresetMode):

- NEXT_STEP (gymnasium's default, EnvPool, ALE): step t returns the final observation; step t+1 ignores its action and
  returns the first observation of the next episode. Row t+1 is no transition, and its observation is the final one, so the
  value of row t+1 is the bootstrap of row t.
- SAME_STEP: step t itself returns the first observation of the next episode and puts the final one into its info.
- DISABLED: the caller resets. It is done at once here, which makes it SAME_STEP.

So a step is (obs, reward, terminated, truncated, final_obs): final_obs is None under NEXT_STEP, else it holds the final
observation in the rows of environments that ended. An environment of tensors is told in tensors: none becomes an array, and
under NEXT_STEP, or SAME_STEP with a dense final_obs, nothing waits for the device. Knows nothing of rollouts or policies, and
costs no torch where the environment brings none.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.errors import UsageError

Batch = Any  # a numpy array or a torch tensor, as the environment has it


class Step(NamedTuple):
    """What one vector step returned; leading axis N. All arrays, or all tensors."""

    obs: Batch
    reward: Batch
    terminated: Batch
    truncated: Batch
    final_obs: Batch | None


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

    def reset(self, seed: int | None) -> Batch:
        """First observations, (N, ...); None: the environments' random numbers go on where they are."""
        return self.envs.reset(seed=seed)[0]

    def step(self, action: Batch) -> Step:
        """Step all environments; see the module's docstring for what `final_obs` is."""
        obs, reward, terminated, truncated, info = self.envs.step(action)
        if self.mode is AutoresetMode.NEXT_STEP:
            return Step(obs, reward, terminated, truncated, None)
        if not isinstance(obs, np.ndarray) and is_tensor(obs):
            return self._finish_tensors(obs, reward, terminated, truncated, info)
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

    def _finish_tensors(self, obs: Batch, reward: Batch, terminated: Batch, truncated: Batch, info: dict[str, Any]) -> Step:
        """What `step` does for arrays under SAME_STEP and DISABLED, for tensors."""
        import torch

        done = torch.logical_or(terminated, truncated)  # (N,)
        if self.mode is AutoresetMode.SAME_STEP:
            final: Any = info.get("final_obs")
            if is_tensor(final):
                ended = done.reshape(-1, *[1] * (obs.ndim - 1))
                return Step(obs, reward, terminated, truncated, torch.where(ended, final, obs))
            final_obs = obs
            rows = done.nonzero().flatten().tolist()  # sync: objects lie on the host
            if rows:
                final_obs = obs.clone()
                for index in rows:
                    final_obs[index] = torch.as_tensor(info["final_obs"][index])
            return Step(obs, reward, terminated, truncated, final_obs)
        final_obs = obs
        if done.any():  # sync: the caller resets
            # copies, since an environment may keep what it returned and write to it when it resets
            final_obs, reward, terminated, truncated = (kept.clone() for kept in (obs, reward, terminated, truncated))
            obs = self.envs.reset(options={"reset_mask": done})[0]
        return Step(obs, reward, terminated, truncated, final_obs)

    def close(self) -> None:
        """Release the environments' processes and windows."""
        self.envs.close()


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor; torch is imported for nothing but one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
