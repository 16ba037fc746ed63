"""Episodes of a few steps, with a mask, parts of a reward and one array for all observations."""

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete


class Short(gym.Env):
    """Observes (number of the episode, step); `length` steps an episode, truncated or not. Parts of the reward: 1 and 2."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Discrete(2)

    def __init__(self, length=1, truncates=False, masked=False, parts=False):
        self.length, self.truncates, self.masked, self.parts = length, truncates, masked, parts
        self.episode, self.obs = 0, np.zeros(2, np.float32)

    def _info(self):
        return {"action_mask": np.array([self.episode % 2, 1], np.int8)} if self.masked else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode = 0 if seed is not None else self.episode
        self.episode += 1
        self.obs[:] = self.episode, 0
        return self.obs, self._info()

    def step(self, action):
        self.obs[1] += 1
        over = bool(self.obs[1] == self.length)
        reward = np.array([1.0, 2.0]) if self.parts else float(self.obs[0])
        return self.obs, reward, over and not self.truncates, over and self.truncates, {} if over else self._info()


class Bandit(gym.Env):
    """One step an episode; pays for the sign of what is observed."""

    observation_space, action_space = Box(-1.0, 1.0, (2,)), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, float(action == (self.obs[0] > 0)), True, False, {}
