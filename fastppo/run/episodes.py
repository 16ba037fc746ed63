"""Returns and lengths of finished episodes, read off whole rollouts. Knows nothing of how they were collected."""

import math
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

WINDOW = 100  # episodes behind every mean, as in Stable-Baselines3 and gymnasium's RecordEpisodeStatistics


class EpisodeStatistics:
    """True (undiscounted, unnormalised) episode returns; carries unfinished episodes from rollout to rollout."""

    def __init__(self, num_envs: int) -> None:
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[int] = deque(maxlen=WINDOW)
        self.episodes = 0
        self._running_return = np.zeros(num_envs)
        self._running_length = np.zeros(num_envs, np.int64)

    def update(self, reward: NDArray[Any], done: NDArray[Any], valid: NDArray[Any]) -> int:
        """Account for one rollout: (T, N) each, rows that are not valid count for nothing. Returns episodes finished.

        No Python per step or environment: a running sum over the rollout, and its differences between an environment's ends.
        """
        done = done & valid
        total_return = np.cumsum(np.where(valid, reward, 0.0), axis=0, dtype=np.float64) + self._running_return
        total_length = np.cumsum(valid, axis=0, dtype=np.int64) + self._running_length
        env, step = np.nonzero(done.T)  # by environment, then by step
        follows = np.concatenate(([False], env[1:] == env[:-1]))  # an earlier end of the same environment stands before it
        by_time = np.argsort(step, kind="stable")
        for totals, window, running in (
            (total_return, self.returns, self._running_return),
            (total_length, self.lengths, self._running_length),
        ):
            at_end = totals[step, env]
            before = np.concatenate((at_end[:1] * 0, at_end[:-1])) * follows
            window.extend((at_end - before)[by_time].tolist())
            running[:] = totals[-1]
            last = np.concatenate((env[1:] != env[:-1], [True])) if len(env) else np.zeros(0, bool)
            running[env[last]] -= at_end[last]
        self.episodes += len(env)
        return len(env)

    @property
    def return_mean(self) -> float:
        """Mean return of the last 100 episodes; nan before the first has ended."""
        return math.fsum(self.returns) / len(self.returns) if self.returns else math.nan

    @property
    def length_mean(self) -> float:
        """Mean length of the last 100 episodes, in steps; nan before the first has ended."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else math.nan

    def copy(self) -> "EpisodeStatistics":
        """Of what `state_dict` keeps."""
        copy = EpisodeStatistics(len(self._running_return))
        copy.load_state_dict(self.state_dict())
        return copy

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: finished episodes. Those under way end with the process that ran them."""
        return {"returns": list(self.returns), "lengths": list(self.lengths), "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up `state_dict`'s result."""
        self.returns.extend(state["returns"])
        self.lengths.extend(state["lengths"])
        self.episodes = state["episodes"]
