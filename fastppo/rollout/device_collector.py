"""Fill a rollout from environments that are functions on tensors, with one call of a program for all T steps."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.core.contracts import CollectResult
from fastppo.core.seed_axis import stack
from fastppo.envs.autoreset import ResetSeed
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.multi_seed_envs import SeededTorchVectorEnv
from fastppo.errors import ENVIRONMENT_ERRORS, environment_fault, resetting
from fastppo.policy.spaces import ActionSpec
from fastppo.rollout.env_step import env_step_of, pack, states_of
from fastppo.rollout.storage import Outcomes, Phases, RnnState, check_finite, cut_episodes, on_cpu, outcomes_of
from fastppo.system.tensordicts import TensorDict


class DeviceCollector:
    """Fills a rollout from environments that are functions on tensors, with one call of a program for all T steps."""

    def __init__(
        self, envs: TorchVectorEnv, rollout: TensorDict, action: ActionSpec, rnn_state: RnnState | None = None
    ) -> None:
        """`envs` have been reset."""
        self.envs = envs
        self.rnn_state = rnn_state
        self.tensors: dict[str, Tensor] = dict(rollout.items())
        self.num_steps = rollout.shape[0] - 1
        self.env_step = env_step_of(envs, action)
        self.seeded = isinstance(envs, SeededTorchVectorEnv)
        self.rows = {key: self.tensors[key][:-1] for key in CollectResult._fields if key in self.tensors}  # views made once
        self.last_obs, self.last_valid = self.tensors["obs"][-1], self.tensors["valid"][-1]
        self.cut: Tensor | None = None
        self._start_episodes()

    def reset(self, seed: ResetSeed) -> None:
        """Reset all environments; None: without seeding them."""
        with resetting():
            self.envs.reset(seed=seed)  # type: ignore[arg-type]  # a list is for environments of many seeds
        self._start_episodes()

    def _start_episodes(self) -> None:
        if self.rnn_state is not None:
            self.tensors["episode_start"][-1] = True

    def _policy_state(self) -> tuple[Tensor, ...]:
        """For a recurrent policy: its state, and whether the next observation is the first of an episode. Otherwise ()."""
        if self.rnn_state is None:
            return ()
        episode_start = self.tensors["episode_start"][-1]
        return self.rnn_state.now, episode_start.clone()

    def collect(self, act: Callable[..., CollectResult], noise: Tensor, cut: bool = False) -> Phases:
        """Fill the rollout with one call of `act`. See Collector for the other arguments and errors.

        act: (running, noise (T, N, ...), random (T, N, K)) -> CollectResult. running is the result of `pack`; for a recurrent
            policy see core.acting.collect. All of the time counts as `env`.
        """
        started = time.perf_counter()
        before = self._policy_state()
        try:
            collected = act((*pack(self.envs.running), *before), noise, self.envs.draw(self.num_steps))
        except torch.OutOfMemoryError:  # not the environments' fault
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "in the rollout") from error
        # under vmap a step cannot detect that its results record gradients
        collected = CollectResult(tuple(map(Tensor.detach, collected.running)), *map(Tensor.detach, collected[1:]))
        after, tensors = collected.running, self.tensors
        if self.rnn_state is not None:
            self.rnn_state.begin()
            after, self.rnn_state.now = after[:-2], after[-2]
        running = self.env_step.unpack(after)
        self.envs.running = running
        for key, rows in self.rows.items():
            steps = getattr(collected, key)  # (T, N, ...), or (S, T, N, ...)
            rows.copy_(steps.transpose(0, 1) if self.seeded else steps)
        self.last_obs.copy_(running.obs)
        torch.logical_not(running.done, out=self.last_valid)
        if self.rnn_state is not None:
            tensors["episode_start"][0].copy_(before[1])
            torch.logical_not(tensors["valid"][:-1], out=tensors["episode_start"][1:])  # the row before only reset
        self.cut = cut_episodes(tensors) if cut else None
        if not collected.finite.all():  # sync: once per rollout
            check_finite(tensors)
        return Phases(env=time.perf_counter() - started)

    def outcomes(self) -> Outcomes:
        """Rewards and ends of the last rollout; views if it is on the CPU."""
        return outcomes_of(self.tensors, self.cut)

    def snapshot(self) -> dict[str, Tensor]:
        """The last complete rollout, on the CPU."""
        return on_cpu(self.tensors)

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """The state of each seed's environments and, for a recurrent policy, its own state."""
        return states_of(self.envs, self._policy_state())

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from the result of `state_dicts`."""
        each = [[x.to(self.envs.device, copy=True) for x in state["running"]] for state in states]
        running = stack(each) if self.seeded else each[0]
        if self.rnn_state is not None:
            *running, self.rnn_state.now, episode_start = running
            self.tensors["episode_start"][-1].copy_(episode_start)
        self.envs.running = self.env_step.unpack(tuple(running))
        generators = self.envs.generators if isinstance(self.envs, SeededTorchVectorEnv) else [self.envs.generator]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state["generator"])
        self.last_obs.copy_(self.envs.running.obs)
        torch.logical_not(self.envs.running.done, out=self.last_valid)
