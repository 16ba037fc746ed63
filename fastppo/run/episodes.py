"""Returns and lengths of finished episodes, computed from whole rollouts. Knows nothing of how these were collected."""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_SHOWN = 16  # agents whose returns are kept apart
WINDOW = 100  # episodes behind every mean, as in Stable-Baselines3 and gymnasium's RecordEpisodeStatistics


class Finished(NamedTuple):
    """Episodes in the order in which they ended, (F,) each."""

    env: NDArray[np.int64]
    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]


def info_means(infos: Mapping[str, NDArray[Any]], ended: NDArray[Any]) -> dict[str, float]:
    """Of each number in the infos, (T, N), the mean over the steps that ended an episode, (T, N) bool.

    Without those that no such step has.
    """
    at_ends = {name: numbers[ended & np.isfinite(numbers)] for name, numbers in infos.items()}
    return {name: float(numbers.mean()) for name, numbers in at_ends.items() if numbers.size}


class EpisodeStatistics:
    """Undiscounted, unnormalised episode returns. Unfinished episodes are carried over to the next rollout.

    An episode of several agents is one of their environment: it ends when the last of them does, and its return is the mean of
    the agents' returns. The agents' own returns are its parts.
    """

    def __init__(self, num_envs: int, num_parts: int = 0, num_agents: int = 1) -> None:
        """num_parts: K, if rewards are weighted sums of K parts. num_agents: A, of each environment."""
        self.num_agents = num_agents
        num_parts = num_agents if 1 < num_agents <= MAX_SHOWN else num_parts
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[int] = deque(maxlen=WINDOW)
        self.episodes = 0
        self.finished = Finished(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.int64))  # in the last rollout
        self.parts: list[deque[float]] = [deque(maxlen=WINDOW) for _ in range(num_parts)]  # returns of each part
        self._running_parts = np.zeros((num_parts, num_envs))
        self._running_return = np.zeros(num_envs)
        self._running_length = np.zeros(num_envs, np.int64)

    @property
    def running_length(self) -> NDArray[np.int64]:
        """(N,) steps of each environment's unfinished episode."""
        return self._running_length

    def update(
        self, reward: NDArray[Any], done: NDArray[Any], valid: NDArray[Any], reward_parts: NDArray[Any] | None = None
    ) -> int:
        """Count the episodes of one rollout, (T, N * A) each; rows that are not valid are ignored. Returns the number finished.

        done: ends of whole episodes. reward_parts: (K, T, N), if rewards are weighted sums.

        There is no Python loop over steps or environments: episode ends cut the steps into segments, and these are summed.
        """
        num_steps = len(done)
        if self.num_agents > 1:
            reward, done, valid, reward_parts = self._of_environments(reward, done, valid)
        ended = np.ascontiguousarray((done & valid).T).ravel()  # by environment, then by step, like all arrays below
        starts = np.zeros(len(ended), bool)
        starts[1:] = ended[:-1]
        starts[::num_steps] = True
        first = np.flatnonzero(starts)
        last = np.append(first[1:], len(starts)) - 1
        finished = ended[last]
        opening = np.flatnonzero(first % num_steps == 0)  # each environment's first segment, which continues the last rollout's
        closing = np.append(opening[1:], len(first)) - 1  # and its last one, which the next rollout may continue
        by_time = np.argsort(last[finished] % num_steps, kind="stable")
        ended_with: list[NDArray[Any]] = []
        counted = [(np.where(valid, reward, 0.0), self._running_return), (valid, self._running_length)]
        if reward_parts is not None:
            counted += zip(np.where(valid, reward_parts, 0.0), self._running_parts, strict=True)
        for rows, running in counted:
            totals = np.add.reduceat(rows.T.ravel(), first, dtype=running.dtype)
            totals[opening] += running
            ended_with.append(totals[finished][by_time])
            running[:] = np.where(finished[closing], 0, totals[closing])
        self.finished = Finished(first[finished][by_time] // num_steps, *ended_with[:2])
        for returns, ended_parts in zip(self.parts, ended_with[2:], strict=reward_parts is not None):
            returns.extend(ended_parts.tolist())
        self.returns.extend(self.finished.returns.tolist())
        self.lengths.extend(self.finished.lengths.tolist())
        self.episodes += len(by_time)
        return len(by_time)

    def _of_environments(
        self, reward: NDArray[Any], done: NDArray[Any], valid: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Of rows of agents, (T, N * A), what `update` takes of their environments, (T, N): the agents' rewards are parts."""
        each, ends, acts = (x.reshape(len(x), -1, self.num_agents) for x in (np.where(valid, reward, 0.0), done, valid))
        parts = np.moveaxis(each, -1, 0) if self.parts else None
        return each.mean(-1, dtype=np.float64), np.asarray(ends.any(-1)), np.asarray(acts.any(-1)), parts

    @property
    def return_mean(self) -> float:
        """Mean return of the last 100 episodes; nan before the first has ended."""
        return math.fsum(self.returns) / len(self.returns) if self.returns else math.nan

    @property
    def part_means(self) -> list[float]:
        """Mean return of each part of the reward in these episodes."""
        return [math.fsum(returns) / len(returns) if returns else math.nan for returns in self.parts]

    @property
    def length_mean(self) -> float:
        """Mean length of the last 100 episodes, in steps; nan before the first has ended."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else math.nan

    def forget_running(self) -> None:
        """Drop unfinished episodes: the environments start new ones."""
        self._running_return[:], self._running_length[:], self._running_parts[:] = 0.0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """As plain data: finished episodes, and return and length so far of unfinished ones."""
        parts = {"parts": list(map(list, self.parts)), "running_parts": self._running_parts.tolist()}
        return {
            **(parts if self.parts else {}),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "episodes": self.episodes,
            "running_return": self._running_return.tolist(),
            "running_length": self._running_length.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`. Raises ValueError, TypeError or KeyError if it is not one."""
        returns, lengths = map(float, state["returns"]), map(int, state["lengths"])
        self.returns, self.lengths = deque(returns, maxlen=WINDOW), deque(lengths, maxlen=WINDOW)
        self.episodes = int(state["episodes"])
        running_return = np.array(state["running_return"], self._running_return.dtype)
        running_length = np.array(state["running_length"], self._running_length.dtype)
        if running_return.shape != self._running_return.shape or running_length.shape != running_return.shape:
            raise ValueError(f"episodes of {len(running_return)} environments, not {len(self._running_return)}")
        self._running_return, self._running_length = running_return, running_length
        if self.parts:
            running_parts = np.array(state["running_parts"], np.float64)
            if running_parts.shape != self._running_parts.shape or len(state["parts"]) != len(self.parts):
                raise ValueError(f"returns of {len(state['parts'])} parts of the reward, not {len(self.parts)}")
            self.parts = [deque(map(float, returns), maxlen=WINDOW) for returns in state["parts"]]
            self._running_parts = running_parts
