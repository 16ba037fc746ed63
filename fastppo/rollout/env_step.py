"""One step of environments that are functions on tensors, as a program takes it. Knows nothing of rollouts.

The text of this file is in the key of compiled programs (see `EnvStep.sources`).
"""

import contextlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_structure, tree_unflatten

from fastppo.core.seed_axis import of_seed
from fastppo.envs.device import DeviceEnv, Running, TorchVectorEnv, autoreset_step
from fastppo.envs.multi_seed_envs import SeededTorchVectorEnv
from fastppo.policy.spaces import ActionSpec
from fastppo.system.modes import theirs


@dataclass(frozen=True)
class EnvStep:
    """One step of environments that are functions on tensors, as core.acting.collect takes it. A program's setting."""

    env: DeviceEnv
    action: ActionSpec
    state_spec: TreeSpec  # how the tensors of the environment's own state hang together

    def __call__(
        self, running: tuple[Tensor, ...], action: Tensor, random: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """See core.contracts.EnvStep."""
        action = self.action.to_env(action)
        with theirs():
            after, result = autoreset_step(self.env, self.unpack(running), action, random)
        return pack(after), (result.reward, result.terminated, result.truncated)

    def sources(self) -> list[Path] | None:
        """The files that say what it computes; None for an environment from elsewhere, whose code may lie in any."""
        folder = Path(autoreset_step.__code__.co_filename).parent
        with contextlib.suppress(OSError, TypeError):  # a class of a notebook has no file
            if Path(inspect.getfile(type(self.env))).parent == folder:
                return [Path(__file__), *sorted(folder.glob("*.py"))]
        return None

    def unpack(self, running: tuple[Tensor, ...]) -> Running:
        """The inverse of `pack`."""
        obs, done, elapsed, *state = running
        return Running(tree_unflatten(state, self.state_spec), obs, elapsed, done)


def env_step_of(envs: TorchVectorEnv, action: ActionSpec) -> EnvStep:
    """`envs` as a function. Reset them before: what their state looks like is part of it."""
    return EnvStep(envs.env, action.to(envs.device), tree_structure(envs.running.state))


def pack(running: Running) -> tuple[Tensor, ...]:
    """As programs carry it: observation, done, elapsed, then the tensors of the environment's own state."""
    return (running.obs, running.done, running.elapsed, *tree_leaves(running.state))


def states_of(envs: TorchVectorEnv, remembered: tuple[Tensor, ...] = ()) -> list[dict[str, Any]]:
    """The environments of each seed as they stand, see Collector.state_dicts, and behind that what is remembered of them.

    On the CPU nothing is copied: a step makes new tensors. A captured graph writes to the same ones.
    """
    running = [x.clone() if x.is_cuda else x for x in (*pack(envs.running), *remembered)]
    if not isinstance(envs, SeededTorchVectorEnv):
        return [{"running": running, "generator": envs.generator.get_state()}]
    return [
        {"running": of_seed(running, seed), "generator": generator.get_state()}
        for seed, generator in enumerate(envs.generators)
    ]
