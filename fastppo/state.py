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

from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.programs import Normalization
from fastppo.errors import UsageError
from fastppo.policy.agent import moments_from_state, policy_state, weights_from_state
from fastppo.policy.networks import Network
from fastppo.policy.normalization import RunningMoments, init_moments, inverse_std, make_normalization
from fastppo.policy.spaces import ActionSpec, ObsSpec
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


def init_state(
    config: TrainConfig, network: Network, obs: ObsSpec, device: torch.device, seeds: Mapping[str, int]
) -> TrainState:
    """Fresh parameters and statistics."""
    params = network.init(torch.Generator().manual_seed(seeds["parameters"])).to(device)
    return TrainState(
        params=params,
        adam=init_adam(params),
        obs_moments=None if not config.norm_obs else {leaf.key: init_moments(leaf.shape, device) for leaf in obs.normalized},
        return_moments=init_moments((), device) if config.norm_reward else None,
        return_carry=torch.zeros(config.num_envs, device=device),
        return_mean=torch.zeros((), device=device),
        return_std=torch.ones((), device=device),
        generators={name: torch.Generator(device).manual_seed(seeds[name]) for name in ("actions", "minibatches")},
        episodes=EpisodeStatistics(config.num_envs),
    )


def normalization_of(state: TrainState) -> Normalization:
    """The statistics as they stand, frozen for one iteration."""
    reward_scale = None if state.return_moments is None else inverse_std(state.return_moments)
    return make_normalization(state.obs_moments, reward_scale, state.return_mean, state.return_std)


def snapshot(state: TrainState) -> TrainState:
    """The state as it stands, for a checkpoint to be made of it later: 30 us where `checkpoint_of` takes 250."""
    generators = {name: generator.clone_state() for name, generator in state.generators.items()}
    return replace(state, params=state.params.clone(), generators=generators, episodes=state.episodes.copy())


def checkpoint_of(network: Network, obs_space: Any, obs: ObsSpec, action: ActionSpec, state: TrainState) -> dict[str, Any]:
    """The state as plain data: tensors, numbers, lists and dicts."""
    normalization = normalization_of(state)
    return {
        "format": 1,
        "policy": policy_state(network, state.params, obs_space, obs, action.space, state.obs_moments, normalization),
        "adam": {key: value.cpu().clone() for key, value in state.adam._asdict().items()},
        "return_moments": None if state.return_moments is None else [moment.cpu() for moment in state.return_moments],
        "generators": {name: generator.get_state() for name, generator in state.generators.items()},
        "episodes": state.episodes.state_dict(),
        "iteration": state.iteration,
        "global_step": state.global_step,
        "seconds": state.seconds,
        "best_return": state.best_return,
    }


def load_state(state: TrainState, network: Network, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Put `checkpoint_of`'s result back. The environments are not in it: they start new episodes."""
    try:
        policy, device = checkpoint["policy"], state.params.device
        state.params.copy_(weights_from_state(policy, network))
        state.adam = AdamState(**{key: value.to(device) for key, value in checkpoint["adam"].items()})
        state.obs_moments = moments_from_state(policy["obs_moments"], device)
        if checkpoint["return_moments"] is not None:
            state.return_moments = RunningMoments(*(moment.to(device) for moment in checkpoint["return_moments"]))
        state.return_mean, state.return_std = policy["return_mean"].to(device), policy["return_std"].to(device)
        for name, generator in state.generators.items():
            generator.set_state(checkpoint["generators"][name])
        state.episodes.load_state_dict(checkpoint["episodes"])
        state.iteration, state.global_step = checkpoint["iteration"], checkpoint["global_step"]
        state.seconds, state.best_return = checkpoint["seconds"], checkpoint["best_return"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"--resume: {path} does not fit the run's config.json ({error})") from None
