"""One step of environments that are functions on tensors, for use in a program. Knows nothing of rollouts.

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
    """A `core.contracts.EnvStep` of these environments and actions; a setting of the program `collect`."""

    env: DeviceEnv
    action: ActionSpec
    state_spec: TreeSpec  # structure of the environment's own state

    def __call__(
        self, running: tuple[Tensor, ...], action: Tensor, random: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
        """`running, (reward, terminated, truncated)` after one step, or after a reset if the episode has ended."""
        action = self.action.to_env(action)
        with theirs():
            after, result = autoreset_step(self.env, self.unpack(running), action, random)
        return pack(after), (result.reward, result.terminated, result.truncated)

    def sources(self) -> list[Path] | None:
        """The files whose text defines this step. None for a user's environment: its code may be anywhere."""
        folder = Path(autoreset_step.__code__.co_filename).parent
        with contextlib.suppress(OSError, TypeError):  # a class defined in a notebook has no file
            if Path(inspect.getfile(type(self.env))).parent == folder:
                return [Path(__file__), *sorted(folder.glob("*.py"))]
        return None

    def unpack(self, running: tuple[Tensor, ...]) -> Running:
        """The inverse of `pack`."""
        obs, done, elapsed, *state = running
        return Running(tree_unflatten(state, self.state_spec), obs, elapsed, done)


def env_step_of(envs: TorchVectorEnv, action: ActionSpec) -> EnvStep:
    """The step of `envs` as a function. They must have been reset: the structure of their state is part of it."""
    return EnvStep(envs.env, action.to(envs.device), tree_structure(envs.running.state))


def pack(running: Running) -> tuple[Tensor, ...]:
    """Running environments as a flat tuple: observation, done, elapsed, then the tensors of the environment's own state."""
    return (running.obs, running.done, running.elapsed, *tree_leaves(running.state))


def states_of(envs: TorchVectorEnv, policy_state: tuple[Tensor, ...] = ()) -> list[dict[str, Any]]:
    """The state of each seed's environments and generators, for Collector.state_dicts; `policy_state` is appended.

    On the CPU nothing is copied, since a step makes new tensors. On a GPU a captured graph writes to the same ones.
    """
    running = [x.clone() if x.is_cuda else x for x in (*pack(envs.running), *policy_state)]
    if not isinstance(envs, SeededTorchVectorEnv):
        return [{"running": running, "generator": envs.generator.get_state()}]
    return [
        {"running": of_seed(running, seed), "generator": generator.get_state()}
        for seed, generator in enumerate(envs.generators)
    ]
