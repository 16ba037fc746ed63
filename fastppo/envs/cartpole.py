"""Gymnasium's CartPoleVectorEnv with a random generator for each environment, as separate environments have.

Gymnasium's class draws the first states of all environments from one generator, in the order in which their episodes end, so
the starts of an environment depend on the other environments in the batch. Does not import torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.utils import seeding
from gymnasium.vector import VectorWrapper
from numpy.typing import NDArray

BLOCK = 16  # episodes to draw numbers for at once: a call for each start would take as long as the step of all


class SeededCartPole(VectorWrapper):
    """CartPoleVectorEnv whose environment i starts the episodes of `gym.make("CartPole-v1")` with environment i's seed."""

    def __init__(self, envs: CartPoleVectorEnv) -> None:
        super().__init__(envs)
        self.cartpole = envs
        self.generators: list[np.random.Generator] = []
        self._ahead = np.empty((envs.num_envs, BLOCK, 4))  # in [0, 1)
        self._used = np.empty(envs.num_envs, np.int64)  # of each environment's block
        envs.np_random = self  # type: ignore[assignment]  # it uses only `uniform`

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """seed: one for each environment, or s for s, s + 1, ...; None: they continue, at first from the system's entropy."""
        if seed is not None or not self.generators:
            each = range(seed, seed + self.num_envs) if isinstance(seed, int) else seed
            seeds: Sequence[int | None] = [None] * self.num_envs if each is None else each
            self.generators = [seeding.np_random(one)[0] for one in seeds]
            self._used[:] = BLOCK
        return self.cartpole.reset(options=options)

    def uniform(self, low: float, high: float, size: tuple[int, int]) -> NDArray[np.float64]:
        """The random numbers (4, K) of the K environments that start an episode."""
        number = size[1]
        if number == 0:  # in most steps
            return np.empty(size)
        starting = np.arange(number) if number == self.num_envs else self.cartpole.prev_done.nonzero()[0]
        for index in starting[self._used[starting] == BLOCK]:
            self._ahead[index], self._used[index] = self.generators[index].random((BLOCK, 4)), 0
        random = self._ahead[starting, self._used[starting]]
        self._used[starting] += 1
        return low + (high - low) * random.T
