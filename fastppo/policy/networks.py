"""Actor and critic networks as pure functions of one flat parameter buffer. Knows nothing of learning or of environments.

The buffer is one tensor (P,); every weight is a view of it. The gradient norm, Adam and a copy of the parameters are then
one operation each instead of one per layer.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastppo.core.programs import Weights
from fastppo.policy.distributions import DIAGONAL_NORMAL, Distribution

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
}


@dataclass(frozen=True)
class MLPActorCritic:
    """Multi-layer perceptrons for actor and critic, apart or on a shared backbone; a `core.programs.Policy`.

    obs_size: D, observations are (..., D). action_size: A, the number of logits or of action components.
    """

    obs_size: int
    action_size: int
    distribution: Distribution
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    share_backbone: bool = False
    log_std_init: float = 0.0
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", self._weight_shapes())

    @property
    def num_params(self) -> int:
        """P, the length of the flat buffer."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every weight, in the order they lie in the buffer. Matrices are (in, out)."""
        shapes: dict[str, tuple[int, ...]] = {}
        for trunk in ("backbone",) if self.share_backbone else ("actor", "critic"):
            sizes = (self.obs_size, *self.hidden_sizes)
            for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
                shapes[f"{trunk}.{layer}.weight"] = (fan_in, fan_out)
                shapes[f"{trunk}.{layer}.bias"] = (fan_out,)
        features = (self.obs_size, *self.hidden_sizes)[-1]
        for head, size in (("actor", self.action_size), ("critic", 1)):
            shapes[f"{head}.head.weight"] = (features, size)
            shapes[f"{head}.head.bias"] = (size,)
        if self.distribution is DIAGONAL_NORMAL:
            shapes["actor.log_std"] = (self.action_size,)
        return shapes

    def init(self, generator: torch.Generator) -> Tensor:
        """A fresh flat buffer (P,) on the CPU: orthogonal weights, gain sqrt(2), 0.01 for the actor's head and 1 for the
        critic's, zero biases (Andrychowicz et al., 2021, arXiv 2006.05990; Engstrom et al., 2020, arXiv 2005.12729)."""
        params = torch.zeros(self.num_params)
        for name, weight in self.weights(params).items():
            if name.endswith(".weight"):
                gain = {"actor.head.weight": 0.01, "critic.head.weight": 1.0}.get(name, math.sqrt(2.0))
                torch.nn.init.orthogonal_(weight, gain, generator=generator)
            elif name == "actor.log_std":
                weight.fill_(self.log_std_init)
        return params

    def weights(self, params: Tensor) -> dict[str, Tensor]:
        """Views of the flat buffer `params`, (P,), by name."""
        parts = params.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def flatten(self, weights: Weights) -> Tensor:
        """The inverse of `weights`: a new flat buffer, (P,). Raises KeyError or ValueError where name or shape differ."""
        for name, shape in self.shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"weight {name} is {tuple(weights[name].shape)}, not {shape}")
        return torch.cat([weights[name].flatten() for name in self.shapes])

    def actor(self, weights: Weights, obs: Tensor) -> Any:
        """Distribution parameters for obs (..., D): logits (..., A), or (mean, log_std) of (..., A) each."""
        return self._actor_head(weights, self._trunk(weights, "actor", obs))

    def critic(self, weights: Weights, obs: Tensor) -> Tensor:
        """V(obs): (..., D) -> (...)."""
        return self._critic_head(weights, self._trunk(weights, "critic", obs))

    def actor_critic(self, weights: Weights, obs: Tensor) -> tuple[Any, Tensor]:
        """Both; a shared backbone runs once."""
        actor_features = self._trunk(weights, "actor", obs)
        critic_features = actor_features if self.share_backbone else self._trunk(weights, "critic", obs)
        return self._actor_head(weights, actor_features), self._critic_head(weights, critic_features)

    def sample(self, dist: Any, noise: Tensor) -> Tensor:
        """An action from the distribution and its noise."""
        return self.distribution.sample(dist, noise)

    def log_prob(self, dist: Any, action: Tensor) -> Tensor:
        """Log-density of the action, (...)."""
        return self.distribution.log_prob(dist, action)

    def entropy(self, dist: Any) -> Tensor:
        """Entropy in nats, (...)."""
        return self.distribution.entropy(dist)

    def _trunk(self, weights: Weights, network: str, x: Tensor) -> Tensor:
        activation = ACTIVATIONS[self.activation]
        trunk = "backbone" if self.share_backbone else network
        for layer in range(len(self.hidden_sizes)):
            x = activation(linear(x, weights[f"{trunk}.{layer}.weight"], weights[f"{trunk}.{layer}.bias"]))
        return x

    def _actor_head(self, weights: Weights, features: Tensor) -> Any:
        out = linear(features, weights["actor.head.weight"], weights["actor.head.bias"])  # (..., A)
        return (out, weights["actor.log_std"].expand_as(out)) if "actor.log_std" in weights else out

    def _critic_head(self, weights: Weights, features: Tensor) -> Tensor:
        return linear(features, weights["critic.head.weight"], weights["critic.head.bias"]).squeeze(-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias, as one matrix product whatever the batch axes. (..., in), (in, out), (out,) -> (..., out)."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[1])
