"""`TrainState`, everything that training changes: its start, its snapshots and its form in a checkpoint.

Knows nothing of files, environments or the command line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.contracts import Normalization
from fastppo.policy.codec import policy_state
from fastppo.policy.network import Network, draw_as_torch
from fastppo.policy.normalization import (
    RunningMoments,
    init_moments,
    inverse_std,
    make_normalization,
)
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.random_streams import Stream, seed_of
from fastppo.ranks import Ranks
from fastppo.run.best import BestPolicy
from fastppo.run.checkpoint_file import FORMAT
from fastppo.run.episodes import EpisodeStatistics
from fastppo.training.novelty import Novelty, init_novelty


@dataclass(frozen=True)
class PolicySnapshot:
    """A copy of the policy after `iteration` iterations, for acting. Training cannot continue from it."""

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
    """Everything that training changes and a checkpoint stores."""

    params: Tensor  # (P,), updated in place, since the network's weights are views of it
    adam: AdamState
    obs_moments: dict[str, RunningMoments] | None  # by leaf of the observation
    return_moments: RunningMoments | None
    return_carry: Tensor  # (N,), running discounted reward of each environment
    return_mean: Tensor  # (), mean and std of the critic's units, see Normalization
    return_std: Tensor
    generators: dict[str, torch.Generator]
    episodes: EpisodeStatistics
    best: BestPolicy[PolicySnapshot]
    wide: frozenset[str]
    iteration: int = 0
    global_step: int = 0
    seconds: float = 0.0
    learning_rate_factor: float = 1.0  # of --desired-kl
    novelty: Novelty | None = None  # of --rnd-coef
    environments: dict[str, Any] | None = None  # their state at this point, if they can be saved
    best_evaluation: float = -math.inf  # mean return of the best policy of --eval-every; -inf: none has judged best.pt

    @property
    def best_return(self) -> float:
        """The score of the best policy: of its evaluation, or see BestPolicy. -inf before any policy has a score."""
        return self.best_evaluation if self.is_evaluated else self.best.score

    @property
    def is_evaluated(self) -> bool:
        """Whether the best policy is the best of those that --eval-every has evaluated, and not judged by training."""
        return self.best_evaluation > -math.inf

    def forget_running(self) -> None:
        """Drop unfinished episodes, because the environments start new ones."""
        self.episodes.forget_running()
        self.best.forget_running()


def init_state(config: TrainConfig, network: Network, obs: ObsSpec, device: torch.device) -> TrainState:
    """A state with fresh parameters and statistics."""
    generator = torch.Generator("cpu").manual_seed(seed_of(config.seed, Stream.PARAMETERS))
    params = network.init(generator)
    if config.init == "torch":
        draw_as_torch(network.weights(params), generator)
    params = params.to(device)
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
        return_carry=torch.zeros(config.num_rows, dtype=torch.float32, device=device),
        return_mean=start.return_mean,
        return_std=start.return_std,
        generators={
            name: torch.Generator(device).manual_seed(seed_of(config.seed, stream)) for name, stream in drawn_from.items()
        },
        episodes=EpisodeStatistics(config.num_envs, len(config.reward_weights or ()), config.num_agents or 1),
        best=BestPolicy(config.num_envs, start),
        wide=start.wide,
        novelty=init_novelty(config, obs, device) if config.rnd_coef > 0 else None,
    )


def normalization_of(state: TrainState | PolicySnapshot) -> Normalization:
    """The current statistics, frozen for one iteration."""
    reward_scale = None if state.return_moments is None else inverse_std(state.return_moments)
    return make_normalization(state.obs_moments, reward_scale, state.return_mean, state.return_std, state.wide)


def preserved(state: TrainState, environments: dict[str, Any] | None) -> TrainState:
    """The state between two iterations, with copies of the generators. Tensors are shared. Takes 8 us."""
    return replace(state, generators=_clones(state.generators), environments=environments)


def snapshot(state: TrainState) -> PolicySnapshot:
    """A copy of the policy. Only the parameters are cloned, since training never writes to the other tensors in place."""
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


def gather_environments(environments: dict[str, Any] | None, ranks: Ranks) -> dict[str, Any] | None:
    """Join the environment states of all processes; see Collector.state_dicts."""
    if environments is None or ranks.size == 1:
        return environments
    return {**environments, "running": [ranks.gather(x) for x in environments["running"]]}


def share_environments(environments: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """This process's part of joined environment states. The inverse of `gather_environments`."""
    if ranks.size == 1:
        return environments
    return {**environments, "running": [ranks.share(x) for x in environments["running"]]}


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
    """The state as plain data: tensors, numbers, text, lists and dicts. For a snapshot, only the policy's data.

    made_with: see fastppo/training/reproducibility.py.
    """
    normalization = normalization_of(state)
    policy = {
        "format": FORMAT,
        "policy": policy_state(network, state.params, obs_space, obs, action.space, state.obs_moments, normalization),
        "iteration": state.iteration,
        "global_step": state.global_step,
        "seconds": state.seconds,
        "return_moments": None if state.return_moments is None else [moment.cpu() for moment in state.return_moments],
        "made_with": dict(made_with),
    }
    if isinstance(state, PolicySnapshot):
        return policy
    return {
        **policy,
        "best_return": state.best_return,
        "adam": {key: value.cpu().clone() for key, value in state.adam._asdict().items()},
        "return_carry": state.return_carry.cpu().clone(),
        "generators": {name: generator.get_state() for name, generator in state.generators.items()},
        "environments": tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, state.environments),
        "episodes": state.episodes.state_dict(),
        "best": state.best.state_dict(snapshot_data),
        "best_evaluation": state.best_evaluation,
        "learning_rate_factor": state.learning_rate_factor,
        "novelty": None if state.novelty is None else state.novelty.state_dict(),
    }


def snapshot_data(policy: PolicySnapshot) -> dict[str, Any]:
    """A policy that has no score yet, as plain data."""
    data = tree_map(lambda x: x.cpu().clone() if isinstance(x, Tensor) else x, vars(policy))
    moments = {} if policy.obs_moments is None else {key: list(moment) for key, moment in data["obs_moments"].items()}
    rewards = [] if policy.return_moments is None else list(data["return_moments"])
    del data["wide"]
    return {**data, "obs_moments": moments, "return_moments": rewards}
