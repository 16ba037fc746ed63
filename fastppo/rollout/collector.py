"""What fills a rollout, and which kind of it fits the environments."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tensordict import TensorDict
from torch import Tensor

from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed
from fastppo.envs.device import TorchVectorEnv
from fastppo.errors import resetting
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.rollout.device_collector import DeviceCollector
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from fastppo.rollout.storage import Outcomes, Phases, RnnState, by_step


class Collector(Protocol):
    """Fills a rollout from environments, again and again. With a memory `act` is given, and returns, what it remembers too."""

    def reset(self, seed: ResetSeed) -> None:
        """Start all environments; their first observation waits in row T, from where `collect` takes it. None: not reseeded."""

    def collect(self, act: Callable[..., Any], noise: Tensor, cut: bool = False) -> Phases:
        """Fill rows 0 .. T-1 and the bootstrap row T.

        Args:
            act: (obs (N, ...), or its leaves by key, noise (N, ...)) -> action (N, ...), on the rollout's device; with a memory
                as core.acting.act_recurrent; see DeviceCollector for its own.
            noise: (T, N, ...).
            cut: end the episodes under way after row T-1, as a time limit would: the caller resets before the next rollout.

        Raises:
            TrainingFault: an environment raised, gave no answer, or returned a number that is not finite.
        """
        ...

    def outcomes(self) -> Outcomes:
        """Of the last rollout; views where the rollout is on the CPU."""
        ...

    def kept(self) -> dict[str, Tensor]:
        """The rollout as far as it has come, on the CPU: for the report of a fault."""
        ...

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """Each seed's environments as they stand between two rollouts: tensors in lists and dicts. None: they cannot tell."""
        ...

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up `state_dicts`' result, of the same environments: form and number of its tensors are the caller's to check."""
        ...


def start_collector(
    envs: AutoresetEnvs,
    rollout: TensorDict,
    obs: ObsSpec,
    action: ActionSpec,
    seed: ResetSeed,
    rnn_state: RnnState | None = None,
) -> Collector:
    """Reset the environments: functions on tensors get a DeviceCollector, others that return a tensor a TensorCollector.

    Raises TrainingFault where an environment fails to reset, or takes longer than the deadline of `envs`.
    """
    rollout = by_step(rollout)
    with resetting():
        obs_start, mask = envs.reset_and_mask(seed)
        if isinstance(envs.envs, TorchVectorEnv):
            return DeviceCollector(envs.envs, rollout, action, rnn_state)
        of_tensors = isinstance(obs.observed[0].find(obs_start), Tensor)
        collector = (TensorCollector if of_tensors else HostCollector)(envs, rollout, obs, action, rnn_state)
        collector.begin(obs_start, mask)
    return collector
