"""What training moves, and that as data: `TrainState`, how it starts, and what a checkpoint holds of it.

Knows nothing of files, environments or the command line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.programs import Normalization
from fastppo.errors import UsageError, brief
from fastppo.policy.agent import checked, moments_from_state, policy_state, weights_from_state
from fastppo.policy.networks import Network
from fastppo.policy.normalization import RunningMoments, init_moments, inverse_std, make_normalization
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.random_streams import Stream, seed_of
from fastppo.run.checkpoint import FORMAT
from fastppo.run.episodes import EpisodeStatistics


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
    iteration: int = 0
    global_step: int = 0
    seconds: float = 0.0
    best_return: float = -math.inf
    environments: dict[str, Any] | None = None  # as they stood when this was kept, where they can tell


def init_state(config: TrainConfig, network: Network, obs: ObsSpec, device: torch.device) -> TrainState:
    """Fresh parameters and statistics."""
    params = network.init(torch.Generator("cpu").manual_seed(seed_of(config.seed, Stream.PARAMETERS))).to(device)
    drawn_from = {"actions": Stream.ACTIONS, "minibatches": Stream.MINIBATCHES}
    return TrainState(
        params=params,
        adam=init_adam(params),
        obs_moments=None if not config.norm_obs else {leaf.key: init_moments(leaf.shape, device) for leaf in obs.normalized},
        return_moments=init_moments((), device) if config.norm_reward else None,
        return_carry=torch.zeros(config.num_envs, dtype=torch.float32, device=device),
        return_mean=torch.zeros((), dtype=torch.float32, device=device),
        return_std=torch.ones((), dtype=torch.float32, device=device),
        generators={
            name: torch.Generator(device).manual_seed(seed_of(config.seed, stream)) for name, stream in drawn_from.items()
        },
        episodes=EpisodeStatistics(config.num_envs),
    )


def normalization_of(state: TrainState) -> Normalization:
    """The statistics as they stand, frozen for one iteration."""
    reward_scale = None if state.return_moments is None else inverse_std(state.return_moments)
    return make_normalization(state.obs_moments, reward_scale, state.return_mean, state.return_std)


def frozen(state: TrainState, environments: dict[str, Any] | None) -> TrainState:
    """The state between two iterations, which a fault in the next one leaves as it is: 8 us."""
    return replace(state, generators=_clones(state.generators), environments=environments)


def snapshot(state: TrainState) -> TrainState:
    """A copy of the policy and all beside it, for a checkpoint to be made of later: 30 us where `checkpoint_of` takes 250."""
    generators, episodes = _clones(state.generators), state.episodes.copy()
    return replace(state, params=state.params.clone(), generators=generators, episodes=episodes, environments=None)


def _clones(generators: Mapping[str, torch.Generator]) -> dict[str, torch.Generator]:
    return {name: generator.clone_state() for name, generator in generators.items()}


def checkpoint_of(
    network: Network,
    obs_space: Any,
    obs: ObsSpec,
    action: ActionSpec,
    made_with: Mapping[str, str],
    state: TrainState,
) -> dict[str, Any]:
    """The state as plain data: tensors, numbers, text, lists and dicts. made_with: see fastppo/reproducibility.py."""
    normalization = normalization_of(state)
    return {
        "format": FORMAT,
        "policy": policy_state(network, state.params, obs_space, obs, action.space, state.obs_moments, normalization),
        "adam": {key: value.cpu().clone() for key, value in state.adam._asdict().items()},
        "return_moments": None if state.return_moments is None else [moment.cpu() for moment in state.return_moments],
        "return_carry": state.return_carry.cpu().clone(),
        "generators": {name: generator.get_state() for name, generator in state.generators.items()},
        "environments": tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, state.environments),
        "episodes": state.episodes.state_dict(),
        "iteration": state.iteration,
        "global_step": state.global_step,
        "seconds": state.seconds,
        "best_return": state.best_return,
        "made_with": dict(made_with),
    }


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
        state.seconds, state.best_return = checkpoint["seconds"], checkpoint["best_return"]
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
