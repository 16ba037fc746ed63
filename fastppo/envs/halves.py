"""N environments as two halves, of which one steps while the policy acts for the other: `--env-halves`.

Each half is a vector environment of N / 2 whose step is in two parts: `step_async` begins it in other processes or threads, and
`step_wait` waits for its end. Environment i of the N is seeded as it is without halves. A rollout steps the halves in turns
(rollout/halves_collector.py). The whole is a vector environment too, for what comes before training. Knows nothing of policies.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gymnasium.vector import VectorEnv

from fastppo.envs.agents import agents_of
from fastppo.envs.atari import EpisodicLife
from fastppo.envs.multi_seed_envs import JoinedVectorEnv
from fastppo.envs.registry import find_spec, is_atari
from fastppo.errors import UsageError
from fastppo.system.cpus import available_cores

if TYPE_CHECKING:
    from fastppo.envs.factory import EnvConfig

NUM_HALVES = 2


@runtime_checkable
class StepsAsync(Protocol):
    """What a half has beside the methods of a vector environment."""

    def step_async(self, actions: Any) -> None:
        """Begin a step; actions: (N / 2, ...)."""
        ...

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait for its end: what `step` returns."""
        ...


class HalvesVectorEnv(JoinedVectorEnv):
    """Both halves as one vector environment. `envs` has the halves."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Environment i is seeded with seed + i; None: none is."""
        seeds = None if seed is None else [seed + self._rows(half).start for half in range(len(self.envs))]
        return super().reset(seed=seeds, options=options)


def make_halves(config: "EnvConfig", on_cpu: bool, make: Callable[["EnvConfig"], VectorEnv]) -> HalvesVectorEnv:
    """The environments of a run in two halves.

    Args:
        config: of all N environments.
        on_cpu: the policy acts on the CPU, and needs a core beside the processes of a half. On a GPU a half may use all cores
            while the policy acts for the other.
        make: makes a half.

    Raises:
        UsageError: their step is not in two parts, or they have several agents.
    """
    most = config.num_threads or max(available_cores() - on_cpu, 1)
    size = config.num_envs // NUM_HALVES
    made: list[VectorEnv] = []
    try:
        for half in range(NUM_HALVES):
            made.append(make(replace(config, num_envs=size, num_threads=most, half=half)))
            _refuse_others(config, made[half])
    except BaseException:
        for envs in made:
            envs.close()
        raise
    return HalvesVectorEnv(made, config.info_names)


def _refuse_others(config: "EnvConfig", half: VectorEnv) -> None:
    if agents_of(half) is not None:
        raise UsageError(f"--env-halves on is for one agent, and {config.env_id} has several: leave it off")
    if isinstance(half.env if isinstance(half, EpisodicLife) else half, StepsAsync):
        return
    known = None if config.backend == "envpool" or is_atari(config.env_id) else find_spec(config.env_id)
    instead = "" if known is None or known.entry_point is None else "use --vectorization grouped, or "
    raise UsageError(f"--env-halves on: {config.env_id} is stepped while the policy waits: {instead}leave it off")
