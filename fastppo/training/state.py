"""What training moves, and that as data: `TrainState`, how it starts, and what a checkpoint holds of it.

Knows nothing of files, environments or the command line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.losses import Total, alone
from fastppo.errors import UsageError, brief
from fastppo.policy.codec import checked, moments_from_state, policy_state, weights_from_state
from fastppo.policy.network import Network
from fastppo.policy.normalization import (
    RunningMoments,
    discounted_return,
    init_moments,
    inverse_std,
    make_normalization,
    update_moments,
)
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.random_streams import Stream, seed_of
from fastppo.run.best import BestPolicy
from fastppo.run.checkpoint_file import FORMAT
from fastppo.run.episodes import EpisodeStatistics
from fastppo.system.modes import ours


@dataclass(frozen=True)
class PolicySnapshot:
    """A policy as it acted in the iterations after `iteration`, to be used and not to be trained on: copies."""

    params: Tensor  # (P,)
    obs_moments: dict[str, RunningMoments] | None
    return_moments: RunningMoments | None
    return_mean: Tensor  # ()
    return_std: Tensor
    iteration: int
    global_step: int
    seconds: float
    wide: frozenset[str]  # leaves of the observation that are normalised in float64


@dataclass
class TrainState:
    """Everything that training moves and a checkpoint keeps."""

    params: Tensor  # (P,), written in place: the weights that act are views of it
    adam: AdamState
    obs_moments: dict[str, RunningMoments] | None  # by leaf of the observation
    return_moments: RunningMoments | None
    return_carry: Tensor  # (N,), each environment's discounted reward so far
    return_mean: Tensor  # () units of the critic, see Normalization
    return_std: Tensor
    generators: dict[str, torch.Generator]
    episodes: EpisodeStatistics
    best: BestPolicy[PolicySnapshot]
    wide: frozenset[str]
    iteration: int = 0
    global_step: int = 0
    seconds: float = 0.0
    environments: dict[str, Any] | None = None  # as they stood when this was kept, where they can tell

    @property
    def best_return(self) -> float:
        """The return by which the best policy is the best, see BestPolicy; -inf where none could be judged."""
        return self.best.score

    def forget_running(self) -> None:
        """Episodes under way end without counting: the environments start new ones."""
        self.episodes.forget_running()
        self.best.forget_running()


def init_state(config: TrainConfig, network: Network, obs: ObsSpec, device: torch.device) -> TrainState:
    """Fresh parameters and statistics."""
    params = network.init(torch.Generator("cpu").manual_seed(seed_of(config.seed, Stream.PARAMETERS))).to(device)
    drawn_from = {"actions": Stream.ACTIONS, "minibatches": Stream.MINIBATCHES}
    start = PolicySnapshot(
        params=params.clone(),
        obs_moments=None if not config.norm_obs else {leaf.key: init_moments(leaf.shape, device) for leaf in obs.normalized},
        return_moments=init_moments((), device) if config.norm_reward else None,
        return_mean=torch.zeros((), dtype=torch.float32, device=device),
        return_std=torch.ones((), dtype=torch.float32, device=device),
        iteration=0,
        global_step=0,
        seconds=0.0,
        wide=obs.wide,
    )
    return TrainState(
        params=params,
        adam=init_adam(params),
        obs_moments=start.obs_moments,
        return_moments=start.return_moments,
        return_carry=torch.zeros(config.num_envs, dtype=torch.float32, device=device),
        return_mean=start.return_mean,
        return_std=start.return_std,
        generators={
            name: torch.Generator(device).manual_seed(seed_of(config.seed, stream)) for name, stream in drawn_from.items()
        },
        episodes=EpisodeStatistics(config.num_envs),
        best=BestPolicy(config.num_envs, start),
        wide=start.wide,
    )


def normalization_of(state: TrainState | PolicySnapshot) -> Normalization:
    """The statistics as they stand, frozen for one iteration."""
    reward_scale = None if state.return_moments is None else inverse_std(state.return_moments)
    return make_normalization(state.obs_moments, reward_scale, state.return_mean, state.return_std, state.wide)


@ours
def update_return_moments(state: TrainState, steps: Mapping[str, Tensor], gamma: float) -> None:
    """Add a rollout's discounted returns to their statistics, where the state has any.

    steps: (T, N) `reward terminated truncated valid` of all processes.
    """
    if state.return_moments is not None:
        reward, valid = steps["reward"], steps["valid"]
        done = steps["terminated"] | steps["truncated"]
        running, state.return_carry = discounted_return(reward, done, valid, state.return_carry, gamma)
        state.return_moments = update_moments(state.return_moments, running.flatten(), valid.flatten())


@ours
def update_obs_moments(state: TrainState, rollout: Mapping[str, Tensor], total: Total = alone) -> None:
    """Add a rollout's observations in valid rows to their statistics, where the state has any.

    rollout: (T+1, N / K, ...) of this process, which `total` adds up with those of the others.
    """
    if state.obs_moments is not None:
        valid = rollout["valid"][:-1].flatten()
        state.obs_moments = {
            key: update_moments(moments, rollout[key][:-1].flatten(0, 1), valid, total)
            for key, moments in state.obs_moments.items()
        }


def frozen(state: TrainState, environments: dict[str, Any] | None) -> TrainState:
    """The state between two iterations, which a fault in the next one leaves as it is: 8 us."""
    return replace(state, generators=_clones(state.generators), environments=environments)


def snapshot(state: TrainState) -> PolicySnapshot:
    """A copy of the policy; all but the parameters is replaced, and never written to."""
    return PolicySnapshot(
        state.params.clone(),
        state.obs_moments,
        state.return_moments,
        state.return_mean,
        state.return_std,
        state.iteration,
        state.global_step,
        state.seconds,
        state.wide,
    )


def _clones(generators: Mapping[str, torch.Generator]) -> dict[str, torch.Generator]:
    return {name: generator.clone_state() for name, generator in generators.items()}


def checkpoint_of(
    network: Network,
    obs_space: Any,
    obs: ObsSpec,
    action: ActionSpec,
    made_with: Mapping[str, str],
    state: TrainState | PolicySnapshot,
) -> dict[str, Any]:
    """The state as plain data: tensors, numbers, text, lists and dicts; of a snapshot only what a policy needs.

    made_with: see fastppo/training/reproducibility.py.
    """
    normalization = normalization_of(state)
    policy = {
        "format": FORMAT,
        "policy": policy_state(network, state.params, obs_space, obs, action.space, state.obs_moments, normalization),
        "iteration": state.iteration,
        "global_step": state.global_step,
        "seconds": state.seconds,
        "made_with": dict(made_with),
    }
    if isinstance(state, PolicySnapshot):
        return policy
    return {
        **policy,
        "best_return": state.best_return,
        "adam": {key: value.cpu().clone() for key, value in state.adam._asdict().items()},
        "return_moments": None if state.return_moments is None else [moment.cpu() for moment in state.return_moments],
        "return_carry": state.return_carry.cpu().clone(),
        "generators": {name: generator.get_state() for name, generator in state.generators.items()},
        "environments": tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, state.environments),
        "episodes": state.episodes.state_dict(),
        "best": state.best.state_dict(snapshot_data),
    }


def snapshot_data(policy: PolicySnapshot) -> dict[str, Any]:
    """A policy that is still to be judged, as plain data."""
    data = tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, vars(policy))
    moments = {} if policy.obs_moments is None else {key: list(kept) for key, kept in data["obs_moments"].items()}
    rewards = [] if policy.return_moments is None else list(data["return_moments"])
    del data["wide"]
    return {**data, "obs_moments": moments, "return_moments": rewards}


def snapshot_from(data: Any, state: TrainState) -> PolicySnapshot:
    """The inverse of `snapshot_data`, for the run of `state`. Raises ValueError for what is none of its policies."""
    check_alike(snapshot_data(snapshot(state)), data, "best.policy")
    device = state.params.device
    names = ("params", "return_mean", "return_std")
    named = {name: checked(data[name], f"best.policy.{name}", torch.float32).to(device) for name in names}
    obs_moments = moments_from_state(data["obs_moments"], device)
    rewards = moments_from_state({"reward": data["return_moments"]}, device) if data["return_moments"] else None
    return PolicySnapshot(
        **{
            **data,
            **named,
            "wide": state.wide,
            "obs_moments": obs_moments or None,
            "return_moments": None if rewards is None else rewards["reward"],
        }
    )


def load_state(
    state: TrainState, network: Network, checkpoint: Mapping[str, Any], expected: Mapping[str, Any], path: Path
) -> list[str]:
    """Put `checkpoint_of`'s result back into a fresh state.

    Args:
        expected: the fresh state's own `checkpoint_of`, whose form it must have.
        path: of the checkpoint, for messages.

    Returns:
        What could not be put back, a line each.

    Raises:
        UsageError: it is another run's, or somebody else's.
    """
    lost, device = [], state.params.device
    try:
        params = weights_from_state(checkpoint["policy"], network)
        made_on = checkpoint["made_with"]["device"]
        same_device = made_on.partition(":")[0] == device.type
        if not same_device:
            checkpoint = {**checkpoint, "environments": None}
        if "best" not in checkpoint:  # of an older version, which judged by the last 100 episodes
            checkpoint = {**checkpoint, "best": {**expected["best"], "score": checkpoint["best_return"]}}
        check_alike(expected, checkpoint)
        policy, adam = checkpoint["policy"], checkpoint["adam"]
        counts = [checkpoint["iteration"], checkpoint["global_step"], checkpoint["episodes"]["episodes"]]
        if min(counts) < 0:
            raise ValueError("its counters are below 0")
        state.adam = AdamState(**{key: checked(adam[key], f"adam.{key}", params.dtype).to(device) for key in adam})
        state.obs_moments = moments_from_state(policy["obs_moments"], device)
        if state.return_moments is not None:
            moments = moments_from_state({"reward": checkpoint["return_moments"]}, device) or {}
            state.return_moments = moments["reward"]
        for key in ("return_mean", "return_std"):
            setattr(state, key, checked(policy[key], key, torch.float32, ()).to(device))
        state.return_carry = checked(checkpoint["return_carry"], "return_carry", torch.float32).to(device)
        state.params.copy_(params)
        state.episodes.load_state_dict(checkpoint["episodes"])
        state.iteration, state.global_step = checkpoint["iteration"], checkpoint["global_step"]
        state.seconds = checkpoint["seconds"]
        state.best.load_state_dict(checkpoint["best"], partial(snapshot_from, state=state))
        state.environments = checkpoint["environments"]
        if state.environments is not None:
            torch.Generator(device).set_state(state.environments["generator"])  # refused here, or not at all
        if same_device:
            for name, generator in state.generators.items():
                generator.set_state(checkpoint["generators"][name])
        else:  # another kind of generator; other numbers than those of the start, which have been used
            lost.append(f"random numbers start anew, since those of {made_on} cannot go on on {device}")
            for generator in state.generators.values():
                generator.manual_seed(seed_of(generator.initial_seed(), Stream.CONTINUED, state.iteration))
    except UsageError:
        raise
    except Exception as error:  # what the checks let pass, torch refuses as it pleases
        raise UsageError(f"--resume: {path} does not fit the run's config.json ({brief(error)})") from None
    return lost


def check_alike(expected: Any, given: Any, name: str = "") -> None:
    """Raise ValueError where plain data differs in form: keys, types, shapes and dtypes. Of lists, only those of tensors."""
    if name == "generators" or (name == "environments" and given is None):  # those say themselves what they take
        return
    if type(expected) is not type(given):
        raise ValueError(f"{name or 'it'} is of type {type(given).__name__}, not {type(expected).__name__}")
    if isinstance(expected, list) and expected and isinstance(expected[0], Tensor):
        expected, given = dict(enumerate(expected)), dict(enumerate(given))
    if isinstance(expected, dict):
        if expected.keys() != given.keys() and name not in _OPEN:
            other = sorted(map(str, expected.keys() ^ given.keys()))
            raise ValueError(f"{name or 'the checkpoint'} has other keys than it should: {', '.join(other)}")
        for key in expected.keys() & given.keys():
            check_alike(expected[key], given[key], f"{name}.{key}".removeprefix("."))
    elif isinstance(expected, Tensor) and (expected.shape, expected.dtype) != (given.shape, given.dtype):
        raise ValueError(f"{name} is {tuple(given.shape)} {given.dtype}, not {tuple(expected.shape)} {expected.dtype}")


_OPEN = ("made_with",)  # packages may have come or gone
