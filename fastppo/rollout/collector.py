"""The contract of a collector, which fills a rollout from environments. Chooses the collector of a run."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.halves import HalvesVectorEnv
from fastppo.errors import resetting
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.rollout.device_collector import DeviceCollector
from fastppo.rollout.halves_collector import HalvesCollector
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from fastppo.rollout.storage import Outcomes, Phases, RnnState, by_step
from fastppo.system.tensordicts import TensorDict


class Collector(Protocol):
    """Fills a rollout from environments, again and again. For a recurrent policy `act` takes and returns its state too."""

    def reset(self, seed: ResetSeed) -> None:
        """Reset all environments and write their first observations to row T, where `collect` reads them. None: no seed."""

    def collect(self, act: Callable[..., Any], noise: Tensor, cut: bool = False) -> Phases:
        """Fill rows 0 .. T-1 and the observation of row T.

        Args:
            act: (obs (N, ...), or its leaves by key, noise (N, ...)) -> action (N, ...), on the rollout's device. For a
                recurrent policy, see core.acting.act_recurrent. For a DeviceCollector, see its `collect`.
            noise: (T, N, ...).
            cut: truncate the episodes that have not ended by row T-1, as a time limit would. The caller must reset afterwards.

        Raises:
            TrainingFault: an environment raised, gave no answer, or returned a number that is not finite.
        """
        ...

    def outcomes(self) -> Outcomes:
        """Rewards and ends of the last rollout; views where the rollout is on the CPU."""
        ...

    def snapshot(self) -> dict[str, Tensor]:
        """The rollout up to the current step, on the CPU, for the report of a fault."""
        ...

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """The state of each seed's environments between two rollouts: tensors in lists and dicts. None: not available."""
        ...

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the result of `state_dicts` of the same environments. The caller checks the number and shapes."""
        ...


def start_collector(
    envs: AutoresetEnvs,
    rollout: TensorDict,
    obs: ObsSpec,
    action: ActionSpec,
    seed: ResetSeed,
    rnn_state: RnnState | None = None,
) -> Collector:
    """Reset the environments and choose a collector: by type, and by whether `step` returns tensors or arrays.

    Raises TrainingFault if an environment fails to reset, or takes longer than the deadline of `envs`.
    """
    rollout = by_step(rollout)
    if isinstance(envs.envs, HalvesVectorEnv):
        halves = [AutoresetEnvs(half, envs.deadline, envs.info_names) for half in envs.envs.envs]
        in_turns = HalvesCollector(halves, rollout, obs, action, rnn_state)
        in_turns.reset(seed)
        return in_turns
    with resetting():
        obs_start, mask = envs.reset_and_mask(seed)
        if isinstance(envs.envs, TorchVectorEnv):
            return DeviceCollector(envs.envs, rollout, action, rnn_state)
        of_tensors = isinstance(obs.observed[0].find(obs_start), Tensor)
        collector = (TensorCollector if of_tensors else HostCollector)(envs, rollout, obs, action, rnn_state)
        collector.begin(obs_start, mask)
    return collector
