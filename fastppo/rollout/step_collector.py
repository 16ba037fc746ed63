"""Fill a rollout step by step, from environments that return arrays or tensors."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed, Step
from fastppo.errors import ENVIRONMENT_ERRORS, environment_fault, resetting
from fastppo.policy.spaces import ActionSpec, ObsLeaf, ObsSpec
from fastppo.rollout.storage import (
    Outcomes,
    Phases,
    RnnState,
    check_finite,
    check_tensors,
    comes_from_envs,
    cut_episodes,
    on_cpu,
    outcomes_of,
)


class HostCollector:
    """Steps numpy environments into a rollout. Owns the host side of it and the last observation."""

    def __init__(
        self, envs: AutoresetEnvs, rollout: TensorDict, obs: ObsSpec, action: ActionSpec, rnn_state: RnnState | None = None
    ) -> None:
        self.envs = envs
        self.rnn_state = rnn_state
        self.rollout = rollout
        self.action = action
        self.on_host = rollout.device is None or rollout.device.type == "cpu"
        # on the CPU the rollout itself is written; for a GPU a pinned twin is, so that its copies overlap with stepping
        self.host = rollout if self.on_host else rollout.to("cpu").pin_memory()
        self.arrays = {key: self.host[key].numpy() for key in self.host.keys()}  # noqa: SIM118 (a TensorDict iterates over rows)
        self.obs, self.observed, self.info_mask = obs, obs.observed, obs.info_mask  # searched for once, not in each step
        # views made once: indexing a TensorDict per step costs 15 us
        keys = [leaf.key for leaf in obs] + ([] if rnn_state is None else ["episode_start"])
        self.rows = {key: rollout[key].unbind(0) for key in keys}
        self.host_rows = {key: self.host[key].unbind(0) for key in keys}
        self.act_rows = _rows_to_act_on(self.rows, obs)
        self.actions = rollout["action"][:-1]
        self.seeded = rollout.ndim > 2
        self.shaped = partial(_by_seed, rollout.shape[1]) if self.seeded else _as_it_is
        self.game_over: NDArray[Any] | None = None  # (T, N), where the environments tell
        self.cut: NDArray[Any] | None = None

    def reset(self, seed: ResetSeed) -> None:
        """See Collector."""
        with resetting():
            self.begin(*self.envs.reset_and_mask(seed))

    def begin(self, obs: Any, action_mask: NDArray[Any] | None = None) -> None:
        """Put first observations (N, ...) where `collect` takes them from."""
        self._write(-1, obs, action_mask)
        self.arrays["valid"][-1] = True
        if self.rnn_state is not None:
            self.arrays["episode_start"][-1] = True

    def _write(self, row: int, obs: Any, action_mask: NDArray[Any] | None) -> None:
        for leaf in self.obs:
            if leaf is not self.info_mask:
                self.arrays[leaf.key][row] = self.shaped(_as_stored(leaf, leaf.find(obs)))
            else:
                self.arrays[leaf.key][row] = True if action_mask is None else self.shaped(action_mask)

    def collect(self, act: Callable[..., Tensor], noise: Tensor, cut: bool = False) -> Phases:
        """See Collector."""
        arrays, phases = self.arrays, Phases()
        reward, terminated, truncated, valid = (arrays[key] for key in ("reward", "terminated", "truncated", "valid"))
        for key in self.host_rows:
            arrays[key][0] = arrays[key][-1]
        valid[0] = valid[-1]
        rnn_state = None if self.rnn_state is None else self.rnn_state.begin()
        actions = []  # stacked at the end: a write per step costs 5 us, in whose place the environment gets a copy of its own
        for t, step_noise in enumerate(noise.unbind(0)):
            started = time.perf_counter()
            if not self.on_host:
                for key, rows in self.host_rows.items():
                    self.rows[key][t].copy_(rows[t], non_blocking=True)
            if rnn_state is None:
                chosen = act(self.act_rows[t], step_noise)  # (N, ...)
            else:
                chosen, rnn_state = act(self.act_rows[t], step_noise, rnn_state, self.rows["episode_start"][t])
            actions.append(chosen)
            if not self.on_host:
                chosen = chosen.cpu()  # a sync, once per step: the environments need it
            env_action = self.action.to_env_array(chosen.flatten(0, 1) if self.seeded else chosen)
            acted = time.perf_counter()
            try:
                step = self.envs.step(env_action)
                self._write(t + 1, step.obs, step.action_mask)
                reward[t], terminated[t], truncated[t] = map(self.shaped, (step.reward, step.terminated, step.truncated))
                if step.final_obs is not None:
                    for leaf in self.observed:
                        arrays[f"final_{leaf.key}"][t] = self.shaped(leaf.find(step.final_obs))
            except ENVIRONMENT_ERRORS as error:
                raise environment_fault(error, f"in step {t} of the rollout") from error
            if rnn_state is not None:
                ended = np.logical_or(terminated[t], truncated[t])
                if self.envs.keeps_final_obs:
                    arrays["episode_start"][t + 1] = ended
                else:  # the step after the end resets, and the row after that is a first one
                    np.logical_not(valid[t], out=arrays["episode_start"][t + 1])
                    np.logical_not(ended, out=valid[t + 1])
            if step.game_over is not None:
                if self.game_over is None:
                    self.game_over = np.zeros_like(terminated[:-1])
                self.game_over[t] = self.shaped(step.game_over)
            stepped = time.perf_counter()
            phases.act += acted - started
            phases.env += stepped - acted
        if self.rnn_state is not None and rnn_state is not None:
            self.rnn_state.now = rnn_state
        torch.stack(actions, out=self.actions)
        if not self.on_host:
            self.host["action"][:-1].copy_(self.actions)
        if self.envs.keeps_final_obs:
            valid[1:] = True
        else:
            valid[1:] = ~(terminated[:-1] | truncated[:-1])
        self.cut = cut_episodes(arrays) if cut else None
        check_finite(self.arrays)
        if not self.on_host:
            self.rollout.update_(self.host)
        return phases

    def outcomes(self) -> Outcomes:
        """See Collector."""
        return outcomes_of(self.arrays, self.cut, self.game_over)

    def kept(self) -> dict[str, Tensor]:
        """See Collector."""
        return dict(self.host.items())

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """See Collector: gymnasium's environments cannot tell."""
        return None

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """See Collector."""
        raise NotImplementedError


class TensorCollector:
    """Steps environments of tensors into a rollout, without a detour through numpy and without waiting for the device.

    Environments and rollout may be on different devices: a plain copy then waits for both (one that does not would read what is
    not there yet, or what the next step overwrites). On a GPU the phases say how long the work took to hand in.
    """

    def __init__(
        self, envs: AutoresetEnvs, rollout: TensorDict, obs: ObsSpec, action: ActionSpec, rnn_state: RnnState | None = None
    ) -> None:
        self.envs = envs
        self.rnn_state = rnn_state
        self.tensors: dict[str, Tensor] = dict(rollout.items())
        self.obs, self.observed, self.info_mask = obs, obs.observed, obs.info_mask  # searched for once, not in each step
        self.action = action.to(self.tensors["reward"].device)
        self.env_device = self.tensors["reward"].device  # until the first observation tells
        self.rows = {key: rows.unbind(0) for key, rows in self.tensors.items()}  # views made once
        self.act_rows = _rows_to_act_on(self.rows, obs)
        self.seeded = rollout.ndim > 2
        self.shaped = partial(_by_seed, rollout.shape[1]) if self.seeded else _as_it_is
        self.cut: Tensor | None = None

    def reset(self, seed: ResetSeed) -> None:
        """See Collector."""
        with resetting():
            self.begin(*self.envs.reset_and_mask(seed))

    def begin(self, obs: Any, action_mask: Any = None) -> None:
        """Put first observations (N, ...) where `collect` takes them from; actions will go to the device they came from."""
        self.env_device = self.observed[0].find(obs).device
        with torch.no_grad():
            self._write(-1, obs, action_mask)
        self.rows["valid"][-1].fill_(True)
        if self.rnn_state is not None:
            self.rows["episode_start"][-1].fill_(True)

    @torch.inference_mode()  # what the environments return may record gradients of theirs
    def _write_step(self, t: int, step: Step) -> None:
        self._write(t + 1, step.obs, step.action_mask)
        for key in ("reward", "terminated", "truncated"):
            self.rows[key][t].copy_(self.shaped(getattr(step, key)))
        if step.final_obs is not None:
            for leaf in self.observed:
                self.rows[f"final_{leaf.key}"][t].copy_(self.shaped(leaf.find(step.final_obs)))

    def _write(self, row: int, obs: Any, action_mask: Any) -> None:
        for leaf in self.obs:
            if leaf is not self.info_mask:
                self.rows[leaf.key][row].copy_(self.shaped(_as_stored(leaf, leaf.find(obs))))
            elif action_mask is None:
                self.rows[leaf.key][row].fill_(True)
            else:
                self.rows[leaf.key][row].copy_(self.shaped(torch.as_tensor(action_mask, device=self.env_device)))

    def collect(self, act: Callable[..., Tensor], noise: Tensor, cut: bool = False) -> Phases:
        """See Collector."""
        rows, phases = self.rows, Phases()
        rnn_state = None if self.rnn_state is None else self.rnn_state.begin()
        for key in (*(leaf.key for leaf in self.obs), "valid", *(() if rnn_state is None else ("episode_start",))):
            rows[key][0].copy_(rows[key][-1])
        for t, step_noise in enumerate(noise.unbind(0)):
            started = time.perf_counter()
            if rnn_state is None:
                chosen = act(self.act_rows[t], step_noise)  # (N, ...)
            else:
                chosen, rnn_state = act(self.act_rows[t], step_noise, rnn_state, rows["episode_start"][t])
            rows["action"][t].copy_(chosen)
            chosen = chosen.clone()  # an eager act runs under inference mode, whose tensors must not reach the environments
            env_action = self.action.to_env(chosen.flatten(0, 1) if self.seeded else chosen).to(self.env_device)
            acted = time.perf_counter()
            try:
                step = self.envs.step(env_action)
                self._write_step(t, step)
            except ENVIRONMENT_ERRORS as error:
                raise environment_fault(error, f"in step {t} of the rollout") from error
            if rnn_state is not None:  # as HostCollector
                ended = rows["terminated"][t] | rows["truncated"][t]
                if self.envs.keeps_final_obs:
                    rows["episode_start"][t + 1].copy_(ended)
                else:
                    torch.logical_not(rows["valid"][t], out=rows["episode_start"][t + 1])
                    torch.logical_not(ended, out=rows["valid"][t + 1])
            stepped = time.perf_counter()
            phases.act += acted - started
            phases.env += stepped - acted
        if self.rnn_state is not None and rnn_state is not None:
            self.rnn_state.now = rnn_state
        terminated, truncated, valid = (self.tensors[key] for key in ("terminated", "truncated", "valid"))
        if self.envs.keeps_final_obs:
            valid[1:].fill_(True)
        else:
            torch.logical_not(terminated[:-1] | truncated[:-1], out=valid[1:])
        self.cut = cut_episodes(self.tensors) if cut else None
        finite = [tensor.isfinite().all() for key, tensor in self.tensors.items() if comes_from_envs(key, tensor.dtype)]
        if not torch.stack(finite).all():  # sync: once per rollout
            check_tensors(self.tensors)
        return phases

    def outcomes(self) -> Outcomes:
        """See Collector."""
        return outcomes_of(self.tensors, self.cut)

    def kept(self) -> dict[str, Tensor]:
        """See Collector."""
        return on_cpu(self.tensors)

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """See Collector: nobody asks them."""
        return None

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """See Collector."""
        raise NotImplementedError


def _as_it_is(batch: Any) -> Any:
    return batch


def _by_seed(num_seeds: int, batch: Any) -> Any:
    """What environments returned, (S * N, ...), as (S, N, ...)."""
    return batch.reshape(num_seeds, -1, *batch.shape[1:])


def _rows_to_act_on(rows: Mapping[str, tuple[Tensor, ...]], obs: ObsSpec) -> list[Any]:
    """What `act` gets in each step: views of the rollout's rows, joined as the networks take them."""
    return [obs.join(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]


def _as_stored(leaf: ObsLeaf, batch: Any) -> Any:
    """A leaf as the rollout holds it: a mask, whatever its type and shape, as (N, A) that is not 0."""
    return (batch != 0).reshape(len(batch), -1) if leaf.kind == "mask" else batch
