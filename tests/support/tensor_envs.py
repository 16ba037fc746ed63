"""Environments of tensors with the numbers of their twins of arrays."""

import numpy as np
import torch
from environments import Walk, WalkVector
from gymnasium.vector import VectorEnv

from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.collector import start_collector
from fastppo.rollout.storage import allocate_rollout

CPU = torch.device("cpu")


class TensorTwin(VectorEnv):
    """WalkVector in tensors, as a simulator does it: what it returns are its own buffers, and every call writes to them.

    final: how SAME_STEP tells the final observations: "dense", nan where no episode ended; "rows", a list with None there; or
    "objects", as gymnasium does.
    """

    def __init__(self, num_envs, mode="NextStep", final="dense", spoil=None):
        self.walks, self.final, self.spoil, self.steps = WalkVector(num_envs, mode), final, spoil, 0
        self.num_envs, self.metadata = num_envs, self.walks.metadata
        self.single_observation_space, self.single_action_space = Walk.observation_space, Walk.action_space
        self.observation_space, self.action_space = self.walks.observation_space, self.walks.action_space
        self.obs, self.final_obs = torch.zeros(num_envs, 3), torch.zeros(num_envs, 3)
        self.reward = torch.zeros(num_envs, dtype=torch.float64)
        self.terminated, self.truncated = torch.zeros(2, num_envs, dtype=torch.bool)

    def reset(self, *, seed=None, options=None):
        if options:
            mask = options["reset_mask"]
            assert mask.dtype is torch.bool
            assert mask.any()
            self.terminated[mask] = self.truncated[mask] = False
            options = {"reset_mask": np.array(mask.tolist())}
        self.obs.copy_(torch.from_numpy(self.walks.reset(seed=seed, options=options)[0]))
        return self.obs, {}

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        obs, reward, terminated, truncated, info = self.walks.step(np.array(actions.tolist()))
        for buffer, value in ((self.obs, obs), (self.terminated, terminated), (self.truncated, truncated)):
            buffer.copy_(torch.from_numpy(value))
        self.reward.copy_(torch.from_numpy(reward))
        if self.spoil and self.spoil[0] == self.steps:
            self.reward[self.spoil[1]] = torch.nan
        self.steps += 1
        if "final_obs" in info and self.final != "objects":
            rows = [None if row is None else torch.from_numpy(row) for row in info["final_obs"]]
            self.final_obs.copy_(torch.stack([torch.full((3,), torch.nan) if row is None else row for row in rows]))
            info = {"final_obs": rows if self.final == "rows" else self.final_obs}
        return self.obs, self.reward, self.terminated, self.truncated, info


def act(obs, noise):
    """Any function of the observation alone."""
    return (obs.sum(-1) * 1000).long() % 3


def started(vector, num_steps, seed=3, device=CPU):
    """A collector as the loop starts it, its rollout, and noise for it."""
    envs, action = AutoresetEnvs(vector), action_spec(vector.single_action_space, False)
    space = obs_spec(vector.single_observation_space)
    rollout = allocate_rollout(num_steps, vector.num_envs, space, action, envs.keeps_final_obs, device)
    noise = torch.zeros(num_steps, *action.noise_shape(vector.num_envs), device=device)
    return start_collector(envs, rollout, space, action, seed), rollout, noise


KINDS = [("NextStep", "dense"), ("SameStep", "dense"), ("SameStep", "rows"), ("SameStep", "objects"), ("Disabled", "dense")]
