"""Action distributions as plain tensor functions: no torch.distributions objects, no validation, no hidden host sync.

Sampling is a pure function of parameters and noise; `*_noise` draws that noise from the caller's generator, for a whole
rollout at once. Knows nothing of networks or action spaces.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ILLEGAL = -1e8  # no noise makes this logit the largest; finite, since 0 * -inf would be nan in entropies and gradients


@dataclass(frozen=True)
class Distribution:
    """One family. `dist` below is the actor's output: logits (..., A), or (mean, log_std) of (..., A) each.

    noise(shape, generator) -> tensor of `shape`; sample(dist, noise) -> action; mode(dist) -> the likeliest action;
    log_prob(dist, action) -> (...); entropy(dist) -> (...), in nats.
    """

    noise: Callable[[tuple[int, ...], torch.Generator], Tensor]
    sample: Callable[[Any, Tensor], Tensor]
    mode: Callable[[Any], Tensor]
    log_prob: Callable[[Any, Tensor], Tensor]
    entropy: Callable[[Any], Tensor]


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, -log(-log(U)) with U uniform in [2^-25, 1): 5 ns each; `exponential_` takes 45."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=generator.device)
    return uniform.clamp_(min=2.0**-25).log_().neg_().log_().neg_()


def categorical_sample(logits: Tensor, noise: Tensor) -> Tensor:
    """argmax(logits + Gumbel noise) has the probabilities softmax(logits) (Gumbel, 1954). (..., A) -> (...) int64."""
    return (logits + noise).argmax(-1)


def categorical_mode(logits: Tensor) -> Tensor:
    """The action of the highest probability. (..., A) -> (...) int64."""
    return logits.argmax(-1)


def categorical_log_prob(logits: Tensor, action: Tensor) -> Tensor:
    """log softmax(logits)[action]. logits (..., A), action (...) int64 -> (...)."""
    chosen = action.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)  # (..., A) one-hot
    # a sum over the one-hot instead of gather: its gradient is a multiplication, not a scatter
    return (logits * chosen).sum(-1) - logits.logsumexp(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """-sum_a p(a) log p(a). (..., A) -> (...)."""
    log_prob = logits.log_softmax(-1)
    return -(log_prob.exp() * log_prob).sum(-1)


def normal_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)


def normal_sample(dist: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
    """mean + std * noise. (..., A) -> (..., A)."""
    mean, log_std = dist
    return mean + log_std.exp() * noise


def normal_mode(dist: tuple[Tensor, Tensor]) -> Tensor:
    """The mean. (..., A) -> (..., A)."""
    return dist[0]


def normal_log_prob(dist: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last axis. (..., A) -> (...)."""
    mean, log_std = dist
    standardized = (action - mean) * (-log_std).exp()
    return (-0.5 * standardized.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def normal_entropy(dist: tuple[Tensor, Tensor]) -> Tensor:
    """sum_i (log_std_i + log(2 pi e) / 2). (..., A) -> (...)."""
    _, log_std = dist
    return (log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)


CATEGORICAL = Distribution(gumbel_noise, categorical_sample, categorical_mode, categorical_log_prob, categorical_entropy)
DIAGONAL_NORMAL = Distribution(normal_noise, normal_sample, normal_mode, normal_log_prob, normal_entropy)


@dataclass(frozen=True)
class MultiCategorical:
    """K independent categorical choices, with the methods of `Distribution`. Component k has `numbers[k]` values.

    Logits are (..., A), A = sum(numbers), one component after the other. An action is (..., K) int64. Log-probability and
    entropy are sums over the components. Components become rows of one tensor, (..., K, widest). Short rows are filled up with
    values that are never chosen.
    """

    numbers: tuple[int, ...]

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard Gumbel noise."""
        return gumbel_noise(shape, generator)

    def sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        """(..., A) and noise (..., A) -> (..., K)."""
        return categorical_sample(self._rows(logits, ILLEGAL), self._rows(noise, 0.0))

    def mode(self, logits: Tensor) -> Tensor:
        """The likeliest value of each component. (..., A) -> (..., K)."""
        return categorical_mode(self._rows(logits, ILLEGAL))

    def log_prob(self, logits: Tensor, action: Tensor) -> Tensor:
        """(..., A), (..., K) -> (...)."""
        return categorical_log_prob(self._rows(logits, ILLEGAL), action).sum(-1)

    def entropy(self, logits: Tensor) -> Tensor:
        """(..., A) -> (...)."""
        return categorical_entropy(self._rows(logits, ILLEGAL)).sum(-1)

    def _rows(self, x: Tensor, filling: float) -> Tensor:
        widest = max(self.numbers)
        if min(self.numbers) == widest:
            return x.unflatten(-1, (len(self.numbers), widest))
        parts = x.split(self.numbers, dim=-1)
        return torch.stack([torch.nn.functional.pad(part, (0, widest - part.shape[-1]), value=filling) for part in parts], -2)


def mask_logits(logits: Tensor, legal: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Logits in which illegal actions have ILLEGAL: their probability and their gradient are 0.

    Huang and Ontanon, 2022, arXiv 2006.14171. logits, legal: (..., A). numbers: the number of logits of each choice, see
    `MultiCategorical`. A choice without a legal action keeps its logits.
    """
    legal = torch.cat([part | ~part.any(-1, keepdim=True) for part in legal.split(numbers, -1)], -1)
    return torch.where(legal, logits, ILLEGAL)


def choices(distribution: Distribution | MultiCategorical, size: int) -> tuple[int, ...]:
    """The number of logits of each choice; a single choice has all `size` of them."""
    return distribution.numbers if isinstance(distribution, MultiCategorical) else (size,)
