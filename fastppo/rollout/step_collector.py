"""Fill a rollout one vector step at a time: choose actions, step the environments, write a row.

One loop and one writer of rows for environments of arrays and of tensors. Views of the rollout are made once: indexing a
TensorDict costs 15 us in each step.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed, Step, np_or_torch
from fastppo.errors import ENVIRONMENT_ERRORS, TrainingFault, environment_fault, resetting
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.rollout.pinned_rows import PinnedRows, pinned
from fastppo.rollout.storage import STEP_KEYS, Outcomes, Phases, RnnState, check_finite, cut_episodes, on_cpu, outcomes_of
from fastppo.system.tensordicts import TensorDict


class StepCollector:
    """The loop over the steps of a rollout. Subclasses define where rows are written and how the environments get actions."""

    def __init__(
        self,
        envs: AutoresetEnvs,
        rollout: TensorDict,
        obs: ObsSpec,
        action: ActionSpec,
        rnn_state: RnnState | None = None,
        first: int | None = None,
    ) -> None:
        """Make the views of the rollout.

        Args:
            rollout: see `by_step`.
            first: the number of the first environment, if `act` runs for others while these step; None: these are all.
        """
        self.in_turns, self.first = first is not None, first or 0
        self.envs, self.action, self.rnn_state = envs, action, rnn_state
        self.obs, self.observed, self.info_mask = obs, obs.observed, obs.info_mask  # computed once, not in each step
        self.seeds = rollout.shape[1:2] if rollout.ndim > 2 else None
        self.tensors: dict[str, Tensor] = dict(rollout.items())
        self.act_keys = [leaf.key for leaf in obs] + ([] if rnn_state is None else ["episode_start"])  # the inputs of `act`
        self.rows_by_key = {key: self.tensors[key].unbind(0) for key in self.act_keys}
        rows = zip(*self.rows_by_key.values(), strict=True)
        self.act_rows = [obs.join(dict(zip(self.act_keys, row, strict=True))) for row in rows]
        self.storage = self._written()
        self.rows = {key: tuple(written) for key, written in self.storage.items()}
        self.game_over: NDArray[Any] | None = None  # (T, N), if the environments report it
        self.reward_parts: NDArray[Any] | None = None  # (K, T, N), if rewards are weighted sums
        self.infos: dict[str, Any] = {}  # (T, N) each, by name of a number in the environments' infos; nan: none
        self.cut: Any = None  # (N,) bool, see Outcomes
        self.on_step: Callable[[int, Any, Step], None] | None = None  # called with t, the actions, and what they led to
        self._now: Tensor | None = None  # the recurrent state in a rollout
        self._sent: Any = None  # the last actions, in the form of the environments

    def _written(self) -> Mapping[str, Any]:
        """The arrays or tensors (T+1, N, ...), by key, in which rows are written."""
        raise NotImplementedError

    def _act_obs(self, t: int) -> Any:
        """The observation of row t, on the device of the policy."""
        return self.act_rows[t]

    def _env_action(self, t: int, action: Tensor) -> Any:
        """Store the actions (N, ...) of row t and return them in the form of the environments."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Complete the rollout after its last step."""

    def reset(self, seed: ResetSeed) -> None:
        """Reset all environments; None: without seeding them."""
        with resetting():
            self.begin(*self.envs.reset_and_mask(seed))

    def begin(self, obs: Any, action_mask: Any = None) -> None:
        """Write the first observations (N, ...) of all environments to row T, where `collect` reads them."""
        self._write_obs(-1, obs, action_mask)
        acting = self.envs.acting
        self.storage["valid"][-1] = True if acting is None else self._by_seed(acting)
        if self.rnn_state is not None:
            self.storage["episode_start"][-1] = True

    def collect(self, act: Callable[..., Any], noise: Tensor, cut: bool = False) -> Phases:
        """Fill the rollout with T calls of `act` and of the environments' `step`. See Collector for arguments and errors."""
        return collect_in_turns([self], act, [noise], cut)

    def begin_rollout(self) -> None:
        """Continue from row T of the last rollout."""
        for key in (*self.act_keys, "valid"):
            self.storage[key][0] = self.storage[key][-1]
        self.infos = {}
        self._now = None if self.rnn_state is None else self.rnn_state.begin()

    def act(self, t: int, act: Callable[..., Any], noise: Tensor, phases: Phases) -> None:
        """Choose the actions of row t, and begin the environments' step."""
        started = time.perf_counter()
        obs = self._act_obs(t)
        if self._now is None:
            action = act(obs, noise)  # (N, ...)
        else:
            action, self._now = act(obs, noise, self._now, self.rows_by_key["episode_start"][t])
        self._sent = self._env_action(t, action)
        acted = time.perf_counter()
        phases.act += acted - started
        if self.in_turns:
            try:
                self.envs.step_async(self._sent)
            except ENVIRONMENT_ERRORS as error:
                raise fault_of(error, t) from error
            phases.env += time.perf_counter() - acted

    def step(self, t: int, phases: Phases) -> None:
        """Step the environments, or wait for the end of the step that has begun, and write its result."""
        started = time.perf_counter()
        try:
            step = self.envs.step_wait() if self.in_turns else self.envs.step(self._sent)
            self._write_step(t, step)
        except ENVIRONMENT_ERRORS as error:
            raise fault_of(error, t) from error
        phases.env += time.perf_counter() - started
        if self.on_step is not None:
            self.on_step(t, self._sent, step)

    def end_rollout(self, cut: bool) -> None:
        """Complete the rollout after its last step."""
        if self.rnn_state is not None and self._now is not None:
            self.rnn_state.now = self._now
        ended = self.storage["terminated"][:-1] | self.storage["truncated"][:-1]
        if self.envs.acting is None:  # else written step by step
            self.storage["valid"][1:] = True if self.envs.keeps_final_obs else ~ended
        self.cut = cut_episodes(self.storage) if cut else None
        self._finish()
        check_finite(self.storage, self.first)

    def _write_step(self, t: int, step: Step) -> None:
        """Write the result of step t: the observation to row t + 1, the rest to row t."""
        self._write_obs(t + 1, step.obs, step.action_mask)
        self._write("reward", t, step.reward)
        self._write("terminated", t, step.terminated)
        self._write("truncated", t, step.truncated)
        if step.final_obs is not None:
            for leaf in self.observed:
                self._write(f"final_{leaf.key}", t, leaf.find(step.final_obs))
        if step.game_over is not None:
            if self.game_over is None:
                self.game_over = np.zeros(self.storage["terminated"][:-1].shape, bool)
            self.game_over[t] = self._by_seed(step.game_over)
        if step.reward_parts is not None:
            if self.reward_parts is None:
                self.reward_parts = np.zeros((step.reward_parts.shape[1], *self.storage["reward"][:-1].shape))
            self.reward_parts[:, t] = np.moveaxis(self._by_seed(step.reward_parts), -1, 0)
        elif self.reward_parts is not None:  # all of these environments have only been reset
            self.reward_parts[:, t] = 0.0
        for name, numbers in step.infos.items():
            self._write_info(name, t, numbers)
        if self.envs.acting is not None:
            self._write("valid", t + 1, self.envs.acting)
        if self.rnn_state is not None:
            ended = self.rows["terminated"][t] | self.rows["truncated"][t]
            if self.envs.keeps_final_obs:
                self.rows["episode_start"][t + 1][...] = ended
            else:  # the step after the end only resets; the row after it is the first of an episode
                self.rows["episode_start"][t + 1][...] = ~self.rows["valid"][t]
                if self.envs.acting is None:
                    self.rows["valid"][t + 1][...] = ~ended

    def _write_info(self, name: str, t: int, numbers: Any) -> None:
        if name not in self.infos:
            reward = self.storage["reward"][:-1]
            self.infos[name] = np_or_torch(reward).full_like(reward, math.nan)
        own = self.infos[name]
        own[t] = self._by_seed(torch.as_tensor(numbers) if isinstance(own, Tensor) else numbers)

    def _write_obs(self, row: int, obs: Any, action_mask: Any) -> None:
        for leaf in self.obs:
            if leaf is self.info_mask and action_mask is None:
                self.rows[leaf.key][row][...] = True
            elif leaf is self.info_mask:
                self._write(leaf.key, row, action_mask)
            elif leaf.kind == "mask":  # of any dtype and shape; stored as (N, A) bool
                mask = leaf.find(obs)
                self._write(leaf.key, row, (mask != 0).reshape(len(mask), -1))
            else:
                self._write(leaf.key, row, leaf.find(obs))

    def _write(self, key: str, row: int, batch: Any) -> None:
        """Write a batch from the environments, (N, ...), or (S * N, ...) for several seeds."""
        self.rows[key][row][...] = self._by_seed(batch)

    def _by_seed(self, batch: Any) -> Any:
        """(S * N, ...) -> (S, N, ...) if there are several seeds."""
        return batch if self.seeds is None else batch.reshape(*self.seeds, -1, *batch.shape[1:])

    def outcomes(self) -> Outcomes:
        """Rewards and ends of the last rollout; views if it is on the CPU."""
        return outcomes_of(self.storage, self.cut, self.game_over, self.reward_parts, self.infos)

    def snapshot(self) -> dict[str, Tensor]:
        """The rollout up to the current step, on the CPU."""
        return on_cpu(self.storage)

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """None: these environments cannot be restored from their state."""
        return None

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Not supported, since `state_dicts` returns None."""
        raise NotImplementedError


def collect_in_turns(parts: Sequence[StepCollector], act: Callable[..., Any], noises: Sequence[Tensor], cut: bool) -> Phases:
    """The loop of a rollout over all parts of the environments, of which each steps while `act` runs for the others.

    noises: (T, n, ...) for each part of n environments. For other arguments and errors see Collector.
    """
    phases = Phases()
    turns = [(part, noise.unbind(0)) for part, noise in zip(parts, noises, strict=True)]
    num_steps = len(noises[0])
    for part in parts:
        part.begin_rollout()
    for t in range(num_steps):
        for part, noise in turns:
            if t > 0:
                part.step(t - 1, phases)
            part.act(t, act, noise[t], phases)
    for part in parts:
        part.step(num_steps - 1, phases)
    for part in parts:
        part.end_rollout(cut)
    return phases


def fault_of(error: BaseException, t: int) -> TrainingFault:
    """What to raise for an environment's error in step t of a rollout."""
    return environment_fault(error, f"in step {t} of the rollout")


class HostCollector(StepCollector):
    """Steps environments of numpy arrays.

    On the CPU rows are written to arrays that share the rollout's memory. For a rollout on a GPU they are written to pinned
    memory: each step takes one copy to the GPU, of all that acting needs, and one back, of the actions. The copies are on the
    stream of `act`, which has to wait for the first and is waited for by the second.
    """

    def _written(self) -> Mapping[str, Any]:
        device = self.tensors["reward"].device
        self.actions: list[Tensor] = list(self.tensors["action"][:-1])
        self.steps: PinnedRows | None = None  # what acting needs, by row
        if shares_memory(device):
            return {key: x.numpy() for key, x in self.tensors.items()}
        final_obs = [key for key in self.tensors if key.startswith("final_")]
        self.steps = PinnedRows(self.tensors, self.act_keys, final_obs)
        self.results = PinnedRows({key: self.tensors[key].unsqueeze(0) for key in STEP_KEYS}, STEP_KEYS)  # as one row
        self.host_actions = pinned(self.tensors["action"].cpu(), device)
        results = {key: x[0] for key, x in self.results.host.items()}
        return {key: x.numpy() for key, x in {**self.steps.host, **results, "action": self.host_actions}.items()}

    def _act_obs(self, t: int) -> Any:
        if self.steps is not None:
            self.steps.upload(t)
        return self.act_rows[t]

    def _env_action(self, t: int, action: Tensor) -> Any:
        self.actions[t] = action  # stacked at the end: a write per step costs 5 us
        if self.steps is not None:
            action = self.host_actions[t].copy_(action)  # a sync, once per step: the environments need it
        return self.action.to_env_array(action if self.seeds is None else action.flatten(0, 1))

    def _finish(self) -> None:
        torch.stack(self.actions, out=self.tensors["action"][:-1])
        if self.steps is not None:
            self.steps.upload(len(self.actions))
            self.results.upload(0)


def shares_memory(device: torch.device) -> bool:
    """Whether arrays on the host can be the rollout."""
    return device.type == "cpu"


class TensorCollector(StepCollector):
    """Steps environments of tensors, without numpy and without waiting for the device.

    Environments and rollout may be on different devices: then a blocking copy waits for both. A non-blocking copy could read
    data that is not written yet or that the next step overwrites. On a GPU the phases are the time to queue the work.
    """

    def _written(self) -> Mapping[str, Any]:
        self.env_device = self.tensors["reward"].device  # until the first observation is known
        self.action = self.action.to(self.env_device)
        return self.tensors

    @torch.inference_mode()
    def begin(self, obs: Any, action_mask: Any = None) -> None:
        """As StepCollector.begin. Actions will be moved to the device of these observations."""
        self.env_device = self.observed[0].find(obs).device
        super().begin(obs, action_mask)

    def _env_action(self, t: int, action: Tensor) -> Any:
        self.rows["action"][t].copy_(action)
        action = action.clone()  # an eager `act` runs in inference mode; inference tensors must not reach the environments
        env_action = self.action.to_env(action if self.seeds is None else action.flatten(0, 1))
        if self.action.is_structure:  # tree_map takes 10 us, of a tensor too
            return tree_map(lambda leaf: leaf.to(self.env_device), env_action)
        return env_action.to(self.env_device)

    _write_step = torch.inference_mode()(StepCollector._write_step)  # tensors from the environments may record gradients

    def _write_obs(self, row: int, obs: Any, action_mask: Any) -> None:
        super()._write_obs(row, obs, None if action_mask is None else torch.as_tensor(action_mask))
