"""Allocate the rollout and fill it from environments. Knows nothing of losses, files or the command line.

The rollout is one TensorDict of batch [T+1, N], allocated once and written in place. Row t < T is step t of every
environment; row T holds the observation after the last step, the bootstrap's, and becomes row 0 of the next rollout. That of
S seeds is [S, T+1, N], and collectors see it step by step, as [T+1, S, N]: "N" is then "S, N" in what they say of shapes, and
their environments are those of envs/multi_seed_envs.py.
"""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_structure, tree_unflatten

from fastppo.core.contracts import CollectResult
from fastppo.core.seed_axis import of_seed, stack
from fastppo.envs.autoreset import AutoresetEnvs, ResetSeed, Step
from fastppo.envs.device import DeviceEnv, Running, TorchVectorEnv, autoreset_step
from fastppo.envs.multi_seed_envs import SeededTorchVectorEnv
from fastppo.errors import ENVIRONMENT_ERRORS, TrainingFault, environment_fault
from fastppo.policy.spaces import ActionSpec, ObsLeaf, ObsSpec
from fastppo.system.modes import theirs


def allocate_rollout(
    num_steps: int,
    num_envs: int,
    obs: ObsSpec,
    action: ActionSpec,
    keeps_final_obs: bool,
    device: torch.device,
    num_seeds: int | None = None,
    remembers: bool = False,
) -> TensorDict:
    """The one list of keys, shapes and dtypes of a rollout; locked, all zeros.

    obs (T+1, N, *obs_shape) float32, or the space's own integer type; of a Dict or Tuple its leaves, `obs.name` each;
    action_mask (T+1, N, A) bool, where there is one; action (T+1, N, *action_shape) as sampled, int64 or float32; reward
    (T+1, N) float32, raw; terminated, truncated (T+1, N) bool; valid (T+1, N) bool: false where the step only reset the
    environment; final_obs as obs, only for environments that reset within the step; episode_start (T+1, N) bool, only for
    a policy with memory: the observation is an episode's first one.
    """

    batch = ((num_seeds,) if num_seeds is not None else ()) + (num_steps + 1, num_envs)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros((*batch, *shape), dtype=dtype, device=device)

    rollout = {
        **{leaf.key: zeros(leaf.shape, leaf.dtype) for leaf in obs},
        "action": zeros(action.shape, action.dtype),
        "reward": zeros((), torch.float32),
        "terminated": zeros((), torch.bool),
        "truncated": zeros((), torch.bool),
        "valid": zeros((), torch.bool),
    }
    if remembers:
        rollout["episode_start"] = zeros((), torch.bool)
    if keeps_final_obs:
        rollout |= {f"final_{leaf.key}": zeros(leaf.shape, leaf.dtype) for leaf in obs if leaf.kind != "mask"}
    return TensorDict(rollout, batch_size=batch, device=device).lock_()


def by_step(rollout: TensorDict) -> TensorDict:
    """A rollout as collectors see it: that of many seeds with the steps first, as views."""
    if rollout.ndim == 2:
        return rollout
    steps_first = {key: x.transpose(0, 1) for key, x in rollout.items()}
    seeds, rows, envs = rollout.shape
    return TensorDict(steps_first, batch_size=[rows, seeds, envs], device=rollout.device).lock_()


@dataclass
class Phases:
    """Seconds spent in the environments and in choosing actions."""

    env: float = 0.0
    act: float = 0.0


STEP_KEYS = ("reward", "terminated", "truncated", "valid")  # what a step brings, by its key in the rollout


class Outcomes(NamedTuple):
    """What the T steps of a rollout brought, for the account: numpy arrays (T, N) on the host."""

    reward: NDArray[Any]
    terminated: NDArray[Any]
    truncated: NDArray[Any]
    valid: NDArray[Any]
    episode_end: NDArray[Any]  # bool: of a whole game, where an episode is one life of it
    cut: NDArray[Any]  # (N,) bool: in row T-1 the caller's cut ended the episode, see Collector.collect


class RnnState:
    """What a policy remembers of each environment, (N, S); of S' seeds (S', N, S)."""

    def __init__(self, start: Tensor) -> None:
        """start: written in each rollout with what is remembered before row 0; `learn` goes through the rows from there."""
        self.start = start
        self.now = start.clone()  # between two rollouts: after row T-1

    def begin(self) -> Tensor:
        """Before row 0."""
        self.start.copy_(self.now)
        return self.start


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
    with _resetting():
        obs_start, mask = envs.reset_and_mask(seed)
        if isinstance(envs.envs, TorchVectorEnv):
            return DeviceCollector(envs.envs, rollout, action, rnn_state)
        of_tensors = isinstance(obs.observed[0].find(obs_start), Tensor)
        collector = (TensorCollector if of_tensors else HostCollector)(envs, rollout, obs, action, rnn_state)
        collector.begin(obs_start, mask)
    return collector


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


class DeviceCollector:
    """Fills a rollout from environments that are functions on tensors, by one call of a program for all T steps."""

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
        """See Collector."""
        with _resetting():
            self.envs.reset(seed=seed)  # type: ignore[arg-type]  # a list is for environments of many seeds
        self._start_episodes()

    def _start_episodes(self) -> None:
        if self.rnn_state is not None:
            self.tensors["episode_start"][-1] = True

    def _remembered(self) -> tuple[Tensor, ...]:
        """What `act` gets behind the environments: the memory, and where it is of an episode that is over."""
        if self.rnn_state is None:
            return ()
        episode_start = self.tensors["episode_start"][-1]
        return self.rnn_state.now, episode_start.clone()

    def collect(self, act: Callable[..., CollectResult], noise: Tensor, cut: bool = False) -> Phases:
        """See Collector; `act` is (running, noise (T, N, ...), random (T, N, K)) -> Collected, `running` being `pack`'s result,

        with a memory what `core.acting.collect` says. Its time is told as `env`.
        """
        started = time.perf_counter()
        before = self._remembered()
        try:
            collected = act((*pack(self.envs.running), *before), noise, self.envs.draw(self.num_steps))
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "in the rollout") from error
        collected = tree_map(Tensor.detach, collected)  # under vmap a step cannot tell that its results record gradients
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
            torch.logical_not(tensors["valid"][:-1], out=tensors["episode_start"][1:])  # the row before has reset it
        self.cut = _cut(tensors) if cut else None
        if not collected.finite.all():  # sync: once per rollout
            _check_tensors(tensors)
        return Phases(env=time.perf_counter() - started)

    def outcomes(self) -> Outcomes:
        """See Collector."""
        return _outcomes(self.tensors, self.cut)

    def kept(self) -> dict[str, Tensor]:
        """See Collector."""
        return _on_cpu(self.tensors)

    def state_dicts(self) -> list[dict[str, Any]] | None:
        """See Collector."""
        return states_of(self.envs, self._remembered())

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """See Collector."""
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
        with _resetting():
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
        self.cut = _cut(arrays) if cut else None
        check_finite(self.arrays)
        if not self.on_host:
            self.rollout.update_(self.host)
        return phases

    def outcomes(self) -> Outcomes:
        """See Collector."""
        return _outcomes(self.arrays, self.cut, self.game_over)

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
        with _resetting():
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
        self.cut = _cut(self.tensors) if cut else None
        finite = [tensor.isfinite().all() for key, tensor in self.tensors.items() if _comes_from_envs(key, tensor.dtype)]
        if not torch.stack(finite).all():  # sync: once per rollout
            _check_tensors(self.tensors)
        return phases

    def outcomes(self) -> Outcomes:
        """See Collector."""
        return _outcomes(self.tensors, self.cut)

    def kept(self) -> dict[str, Tensor]:
        """See Collector."""
        return _on_cpu(self.tensors)

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


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def _rows_to_act_on(rows: Mapping[str, tuple[Tensor, ...]], obs: ObsSpec) -> list[Any]:
    """What `act` gets in each step: views of the rollout's rows, joined as the networks take them."""
    return [obs.join(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]


def _as_stored(leaf: ObsLeaf, batch: Any) -> Any:
    """A leaf as the rollout holds it: a mask, whatever its type and shape, as (N, A) that is not 0."""
    return (batch != 0).reshape(len(batch), -1) if leaf.kind == "mask" else batch


def _outcomes(rows: Mapping[str, Any], cut: Any, game_over: NDArray[Any] | None = None) -> Outcomes:
    """rows: arrays or tensors by key of the rollout; cut: `_cut`'s result, or None; game_over: (T, N), where an episode is one

    life of a game.
    """
    parts = (rows[key][:-1] for key in STEP_KEYS)
    reward, terminated, truncated, valid = (x.cpu().numpy() if isinstance(x, Tensor) else x for x in parts)  # sync: once
    over = terminated if game_over is None else terminated & game_over
    cut_rows = np.zeros_like(valid[-1]) if cut is None else np.asarray(cut.cpu() if isinstance(cut, Tensor) else cut)
    return Outcomes(reward, terminated, truncated, valid, over | truncated, cut_rows)


def _comes_from_envs(key: str, dtype: Any) -> bool:
    """Whether an environment may have put a number there that is none."""
    is_float = dtype.is_floating_point if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.floating)
    return is_float and key != "action"


def check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise TrainingFault naming key, environment and step of the first number that is not finite.

    arrays: by key of the rollout, (T+1, N, ...).
    """
    for key, array in arrays.items():
        if not _comes_from_envs(key, array.dtype) or np.isfinite(array).all():
            continue
        step, *where = np.argwhere(~np.isfinite(array))[0][: arrays["reward"].ndim]
        made_by = step - 1 if key.startswith("obs") else step  # obs[t] came out of step t-1
        who = f"environment {where[-1]}" + (f" of seed {where[0] + 1} of {array.shape[1]}" if len(where) > 1 else "")
        value = np.ravel(array[(step, *where)])
        value = value[~np.isfinite(value)][0]
        how = "not finite" if np.isnan(value) else "infinite or too large for float32"  # which of the two is not known here
        what = f"{key} of {who} is {how} ({value})"
        if made_by < 0:
            raise TrainingFault(f"{what} after a reset; the update was not made")
        action = arrays["action"][(made_by, *where)]
        raise TrainingFault(f"{what} after step {made_by} of the rollout, action {action}; the update was not made")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    check_finite({key: tensor.cpu().numpy() for key, tensor in tensors.items()})


def _cut(rows: Mapping[str, Any]) -> Any:
    """Truncate the episodes under way after row T-1, and say which those are, (N,) bool.

    rows: arrays or tensors by key of the rollout, (T+1, N, ...).
    """
    under_way = rows["valid"][-2] & ~rows["terminated"][-2] & ~rows["truncated"][-2]
    rows["truncated"][-2] |= under_way
    return under_way


@contextlib.contextmanager
def _resetting() -> Iterator[None]:
    try:
        yield
    except ENVIRONMENT_ERRORS as error:
        raise environment_fault(error, "to reset") from error
