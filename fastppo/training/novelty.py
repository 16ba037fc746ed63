"""`--rnd-coef`: a bonus for observations that are new, by random network distillation.

The bonus is added to the rewards of a rollout before it is learned from. Logged returns are those of the environment.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.config import TrainConfig
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.contracts import Normalization, Obs, has_final_obs, normalize_obs, obs_of
from fastppo.core.distillation import distill, novelty
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.network import draw_as_torch
from fastppo.policy.normalization import RunningMoments, discounted_return, init_moments, inverse_std, update_moments
from fastppo.policy.spaces import ObsSpec
from fastppo.random_streams import Stream, seed_of
from fastppo.ranks import Ranks
from fastppo.system.modes import ours

NUM_FEATURES = 64
HIDDEN_SIZES = (128, 128)


@dataclass(frozen=True)
class Novelty:
    """The networks of one seed, and the scale of their error. Immutable: each iteration makes a new one."""

    network: ActorCritic  # reads an observation; its logits are the features
    target: Tensor  # (P,)
    predictor: Tensor  # (P,)
    adam: AdamState
    moments: RunningMoments  # of the discounted sum of errors
    carry: Tensor  # (N,), that sum, by environment; it goes on where an episode ends

    def features(self, params: Tensor, obs: Obs) -> Tensor:
        """(R, F) for observations (R, ...)."""
        weights = self.network.weights(params)
        features: Tensor = self.network.mlp.actor(weights, self.network.encoder.encode(weights, obs))
        return features

    @ours
    def added_to(
        self, rollout: Mapping[str, Tensor], valid: Tensor, normalization: Normalization, config: TrainConfig, ranks: Ranks
    ) -> tuple["Novelty", Tensor]:
        """The bonus of each transition, for the observation that it led to; then one pass of the predictor over these.

            bonus = rnd_coef * error / standard deviation of the discounted sum of errors

        Args:
            rollout: (T+1, N / K, ...) of this process. valid: (T, N) bool, of all processes.
            normalization: of the observations, as the policy gets them.

        Returns:
            The networks after it, and the bonus (T, N) of all processes.
        """
        obs = next_obs(rollout, normalization)  # (T, n, ...)
        rows = tree_map(lambda x: x.flatten(0, 1), obs)
        error = novelty(self.features, self.predictor, self.target, rows).view(len(valid), -1)  # (T, n)
        error = ranks.gather(error, 1)  # (T, N)
        running, carry = discounted_return(error, torch.zeros_like(valid), valid, self.carry, config.gamma)
        moments = update_moments(self.moments, running.flatten(), valid.flatten())
        bonus = torch.where(valid, config.rnd_coef * inverse_std(moments) * error, 0.0)
        weight = ranks.share(valid, 1).to(error.dtype)
        predictor, adam = distill(
            self.features, self.predictor, self.target, self.adam, obs, weight, config.minibatches_per_epoch, ranks.total
        )
        return replace(self, predictor=predictor, adam=adam, moments=moments, carry=carry), bonus

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        tensors = {"target": self.target, "predictor": self.predictor, "carry": self.carry}
        named = {**tensors, "adam": self.adam._asdict(), "moments": list(self.moments)}
        return tree_map(lambda x: x.cpu().clone(), named)

    def restored(self, data: Mapping[str, Any]) -> "Novelty":
        """With the tensors of a `state_dict` of the same shapes."""
        own = tree_map(lambda x: x.to(self.target.device), dict(data))
        own |= {"adam": AdamState(**own["adam"]), "moments": RunningMoments(*own["moments"])}
        return replace(self, **own)


def init_novelty(config: TrainConfig, obs: ObsSpec, device: torch.device) -> Novelty:
    """Fresh networks, with weights as torch draws them."""
    leaves = tuple(leaf for leaf in obs.leaves if leaf.kind != "mask")
    encoder = Encoder(leaves, config.cnn_size, config.cnn_activation, config.cnn)
    network = ActorCritic(
        encoder, MLPActorCritic(encoder.size, NUM_FEATURES, CATEGORICAL, HIDDEN_SIZES, "relu", share_backbone=True)
    )
    generator = torch.Generator("cpu").manual_seed(seed_of(config.seed, Stream.NOVELTY))
    target, predictor = (network.init(generator) for _ in range(2))
    for params in (target, predictor):
        draw_as_torch(network.weights(params), generator)
    target, predictor = target.to(device), predictor.to(device)
    carry = torch.zeros(config.num_rows, dtype=torch.float32, device=device)
    return Novelty(network, target, predictor, init_adam(predictor), init_moments((), device), carry)


def next_obs(rollout: Mapping[str, Tensor], normalization: Normalization) -> Obs:
    """What each step led to, (T, n, ...), normalised; at the end of an episode its last observation."""
    after: Obs = tree_map(lambda x: x[1:], normalize_obs(obs_of(rollout), normalization))
    if not has_final_obs(rollout):
        return after
    final = tree_map(lambda x: x[:-1], normalize_obs(obs_of(rollout, "final_"), normalization))
    ended = (rollout["terminated"] | rollout["truncated"])[:-1]
    return tree_map(lambda x, y: torch.where(ended.view(*ended.shape, *(1,) * (x.ndim - 2)), y, x), after, final)
