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
    """One family. `dist` below is what `parameters` returns: logits (..., A), or (mean, log_std) of (..., A) each.

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


@dataclass(frozen=True)
class Hybrid:
    """Categorical choices and normal components, all independent, with the methods of `Distribution`.

    Choices are as in `MultiCategorical`: D = sum(numbers) logits. There are C normal components, and A = D + C. dist is (logits
    (..., D), mean (..., C), log_std (..., C)). An action is (..., K + C) float32: first the value of each choice, which float32
    holds exactly, then the components. Log-probability and entropy are sums over all of them.
    """

    numbers: tuple[int, ...]
    num_normal: int  # C

    @property
    def choices(self) -> MultiCategorical:
        """The distribution of the choices."""
        return MultiCategorical(self.numbers)

    @property
    def num_logits(self) -> int:
        """D."""
        return sum(self.numbers)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise for the D logits, then normal noise. shape: (..., A)."""
        *batch, _ = shape
        gumbel = gumbel_noise((*batch, self.num_logits), generator)
        return torch.cat([gumbel, normal_noise((*batch, self.num_normal), generator)], -1)

    def sample(self, dist: tuple[Tensor, Tensor, Tensor], noise: Tensor) -> Tensor:
        """noise (..., A) -> (..., K + C)."""
        logits, *normal = dist
        gumbel, gaussian = noise.split([self.num_logits, self.num_normal], -1)
        return self._joined(self.choices.sample(logits, gumbel), normal_sample((normal[0], normal[1]), gaussian))

    def mode(self, dist: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The likeliest values, and the means. -> (..., K + C)."""
        return self._joined(self.choices.mode(dist[0]), dist[1])

    def log_prob(self, dist: tuple[Tensor, Tensor, Tensor], action: Tensor) -> Tensor:
        """action (..., K + C) -> (...)."""
        logits, mean, log_std = dist
        chosen, numbers = action.split([len(self.numbers), self.num_normal], -1)
        return self.choices.log_prob(logits, chosen) + normal_log_prob((mean, log_std), numbers)

    def entropy(self, dist: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """-> (...)."""
        logits, mean, log_std = dist
        return self.choices.entropy(logits) + normal_entropy((mean, log_std))

    def _joined(self, chosen: Tensor, numbers: Tensor) -> Tensor:
        return torch.cat([chosen.to(numbers.dtype), numbers], -1)


Family = Distribution | MultiCategorical | Hybrid


def parameters(out: Tensor, log_std: Tensor | None, family: Family) -> Any:
    """`dist` from a network's outputs (..., A), logits before means, and its log standard deviations (C,)."""
    if log_std is None:
        return out
    if isinstance(family, Hybrid):
        logits, mean = out.split([family.num_logits, family.num_normal], -1)
        return logits, mean, log_std.expand_as(mean)
    return out, log_std.expand_as(out)


def logits_of(dist: Any) -> Tensor:
    """The logits of all choices, of a family that has some."""
    logits: Tensor = dist[0] if isinstance(dist, tuple) else dist
    return logits


def masked(dist: Any, legal: Tensor, family: Family) -> Any:
    """`dist` with the logits of illegal actions masked. legal: (..., D), of all choices."""
    if isinstance(family, Hybrid):
        logits, *normal = dist
        return (mask_logits(logits, legal, family.numbers), *normal)
    return mask_logits(dist, legal, choices(family, dist.shape[-1]))


def mask_logits(logits: Tensor, legal: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Logits in which illegal actions have ILLEGAL: their probability and their gradient are 0.

    Huang and Ontanon, 2022, arXiv 2006.14171. logits, legal: (..., A). numbers: the number of logits of each choice, see
    `MultiCategorical`. A choice without a legal action keeps its logits.
    """
    legal = torch.cat([part | ~part.any(-1, keepdim=True) for part in legal.split(numbers, -1)], -1)
    return torch.where(legal, logits, ILLEGAL)


def choices(family: Family, size: int) -> tuple[int, ...]:
    """The number of logits of each choice among `size` outputs; () for a diagonal normal."""
    if isinstance(family, MultiCategorical | Hybrid):
        return family.numbers
    return () if family is DIAGONAL_NORMAL else (size,)


def num_normal(family: Family, size: int) -> int:
    """How many of `size` outputs are means of normal components; they are the last ones."""
    return size - sum(choices(family, size))
