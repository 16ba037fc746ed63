"""Action distributions as plain tensor functions: no torch.distributions objects, no validation, no hidden host sync.

Sampling is a pure function of parameters and noise; `*_noise` draws that noise from the caller's generator, for a whole
rollout at once. Knows nothing of networks or action spaces.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LOG_STD_RANGE = (-20.0, 2.0)  # of a standard deviation that depends on the state
GAMMA_TRIES = 4  # K
BETA_MARGIN = 1e-6  # distance of samples from 0 and 1, and of alpha and beta from 1
GSDE_EPSILON = 1e-6  # is added to a variance
ILLEGAL = -1e8  # no noise makes this logit the largest; finite, since 0 * -inf would be nan in entropies and gradients


def _unchanged(out: Tensor, *_: Tensor | None) -> Tensor:
    return out


@dataclass(frozen=True)
class Distribution:
    """One family. `dist` below is what `parameters` returns: logits (..., A), or two tensors of (..., C) each for C numbers.

    noise(shape, generator) -> tensor of `shape`; sample(dist, noise) -> action; mode(dist) -> the likeliest action, or the mean
    of a beta; log_prob(dist, action) -> (...); entropy(dist) -> (...), in nats. parameters(out, log_std, features) -> dist,
    from a network's outputs, its weights log_std, if `has_log_std`, and its last hidden layer (R, F), of R rows.
    num_outputs, num_noise: outputs of a network, and numbers of noise, for each logit or number of an action.
    of_features: num_noise is F, see `with_features`.
    """

    noise: Callable[[tuple[int, ...], torch.Generator], Tensor]
    sample: Callable[[Any, Tensor], Tensor]
    mode: Callable[[Any], Tensor]
    log_prob: Callable[[Any, Tensor], Tensor]
    entropy: Callable[[Any], Tensor]
    parameters: Callable[[Tensor, Tensor | None, Tensor | None], Any] = _unchanged
    has_log_std: bool = False
    num_outputs: int = 1
    num_noise: int = 1
    of_features: bool = False


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


def normal_mode(dist: tuple[Tensor, ...]) -> Tensor:
    """The mean. (..., A) -> (..., A)."""
    return dist[0]


def normal_log_prob(dist: tuple[Tensor, ...], action: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian, summed over the last axis. (..., A) -> (...)."""
    mean, log_std, *_ = dist
    standardized = (action - mean) * (-log_std).exp()
    return (-0.5 * standardized.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)


def normal_entropy(dist: tuple[Tensor, ...]) -> Tensor:
    """sum_i (log_std_i + log(2 pi e) / 2). (..., A) -> (...)."""
    _, log_std, *_ = dist
    return (log_std + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)


def normal_parameters(mean: Tensor, log_std: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    """One standard deviation for all states. (..., C), (C,) -> (..., C) twice."""
    assert log_std is not None
    return mean, log_std.expand_as(mean)


def state_normal_parameters(out: Tensor, log_std: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    """A standard deviation for each state: the second half of the outputs is added to log_std. (..., 2 C) -> (..., C) twice.

    Clamped as in Stable-Baselines3's SAC. rsl_rl calls it state_dependent_std.
    """
    assert log_std is not None
    mean, of_state = out.chunk(2, -1)
    return mean, (log_std + of_state).clamp(*LOG_STD_RANGE)


def gsde_parameters(mean: Tensor, log_std: Tensor | None, features: Tensor | None) -> tuple[Tensor, ...]:
    """mean (..., C), log_std (F, C), features (R, F) of the rows -> mean, log std (..., C), features (..., F), std (F, C).

    The noise of an action is features @ matrix with matrix ~ N(0, exp(log_std)^2), so its variance is
    features^2 @ exp(log_std)^2. No gradient flows into the features, as in Stable-Baselines3's StateDependentNoiseDistribution.
    Raffin, Kober and Stulp, 2021, "Smooth exploration for robotic reinforcement learning", arXiv 2005.05719, section 3.
    """
    assert log_std is not None
    assert features is not None
    features, std = features.detach().reshape(*mean.shape[:-1], -1), log_std.exp()
    return mean, 0.5 * (features.square() @ std.square() + GSDE_EPSILON).log(), features, std


def gsde_sample(dist: tuple[Tensor, ...], noise: Tensor) -> Tensor:
    """mean + features @ (std * noise), with the noise as a matrix (F, C). noise (..., F C) -> (..., C)."""
    mean, _, features, std = dist
    return mean + (features.unsqueeze(-1) * std * noise.unflatten(-1, std.shape[-2:])).sum(-2)


def beta_parameters(out: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    """(alpha - 1, beta - 1) = softplus(out): both above 0, so that the density has one peak. (..., 2 C) -> (..., C) twice.

    Chou, Maturana and Scherer, 2017, "Improving stochastic policy gradients in continuous control with deep RL using the Beta
    distribution", section 4.
    """
    a, b = torch.nn.functional.softplus(out).clamp(min=BETA_MARGIN).chunk(2, -1)
    return a, b


def beta_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """For each try of two gamma variables a standard normal number, then for each the logarithm of a uniform one."""
    half = (*shape[:-1], shape[-1] // 2)
    uniform = torch.rand(half, generator=generator, dtype=torch.float32, device=generator.device)
    return torch.cat([normal_noise(half, generator), uniform.clamp_(min=2.0**-25).log_()], -1)


def gamma_sample(shape: Tensor, normal: Tensor, log_uniform: Tensor) -> Tensor:
    """A gamma variable of that shape, which is at least 1. shape (...), normal and log_uniform (K, ...), of K tries -> (...).

    Marsaglia and Tsang, 2000, "A simple method for generating gamma variables": d v, with d = shape - 1/3, c = 1 / sqrt(9 d),
    v = (1 + c x)^3, is accepted if log u < x^2 / 2 + d - d v + d log v. The first accepted try counts. A try fails with a
    probability of 5% at shape 1, less above. Where all fail, v is 1.
    """
    d = shape - 1.0 / 3.0
    v = (1.0 + normal * (9.0 * d).rsqrt()) ** 3
    positive = v > 0.0
    v = torch.where(positive, v, 1.0)
    accepted = positive & (log_uniform < 0.5 * normal.square() + d * (1.0 - v + v.log()))
    chosen = torch.ones_like(d)
    for ok, one in zip(accepted.flip(0).unbind(), v.flip(0).unbind(), strict=True):
        chosen = torch.where(ok, one, chosen)
    return d * chosen


def beta_sample(dist: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
    """x / (x + y) of two gamma variables of shapes alpha and beta. (..., C), noise (..., 4 K C) -> (..., C), inside (0, 1)."""
    shapes = 1.0 + torch.stack(dist)  # (2, ..., C)
    noise = noise.unflatten(-1, (2, GAMMA_TRIES, 2, -1)).movedim((-4, -3, -2), (0, 1, 2))  # (2, K, 2, ..., C)
    x, y = gamma_sample(shapes, noise[0], noise[1]).unbind()
    return (x / (x + y)).clamp(BETA_MARGIN, 1.0 - BETA_MARGIN)  # the density at 0 and at 1 may be 0


def beta_mean(dist: tuple[Tensor, Tensor]) -> Tensor:
    """alpha / (alpha + beta). (..., C) -> (..., C).

    This is the action without sampling. The mode, (alpha - 1) / (alpha + beta - 2), may lie at a bound where the density is
    almost flat: a policy of Pendulum got -359 with the mode and -196 with the mean (benchmarks/LOG.md).
    """
    a, b = dist
    return (1.0 + a) / (2.0 + a + b)


def beta_log_prob(dist: tuple[Tensor, Tensor], action: Tensor) -> Tensor:
    """(alpha - 1) log x + (beta - 1) log(1 - x) - log B(alpha, beta), summed over the last axis. (..., C) -> (...)."""
    a, b = dist
    return (a * action.log() + b * (-action).log1p() - _log_beta(a, b)).sum(-1)


def beta_entropy(dist: tuple[Tensor, Tensor]) -> Tensor:
    """log B(alpha, beta) - (alpha - 1) psi(alpha) - (beta - 1) psi(beta) + (alpha + beta - 2) psi(alpha + beta), summed."""
    a, b = dist
    psi = torch.digamma
    return (_log_beta(a, b) - a * psi(1.0 + a) - b * psi(1.0 + b) + (a + b) * psi(2.0 + a + b)).sum(-1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    """log B(1 + a, 1 + b)."""
    return torch.lgamma(1.0 + a) + torch.lgamma(1.0 + b) - torch.lgamma(2.0 + a + b)


CATEGORICAL = Distribution(gumbel_noise, categorical_sample, categorical_mode, categorical_log_prob, categorical_entropy)
_NORMAL = (normal_noise, normal_sample, normal_mode, normal_log_prob, normal_entropy)
_BETA = (beta_noise, beta_sample, beta_mean, beta_log_prob, beta_entropy)
DIAGONAL_NORMAL = Distribution(*_NORMAL, normal_parameters, has_log_std=True)
STATE_NORMAL = Distribution(*_NORMAL, state_normal_parameters, has_log_std=True, num_outputs=2)
BETA = Distribution(*_BETA, beta_parameters, num_outputs=2, num_noise=4 * GAMMA_TRIES)
GSDE = replace(DIAGONAL_NORMAL, sample=gsde_sample, parameters=gsde_parameters, of_features=True)
CONTINUOUS = {  # by --action-distribution
    "normal": DIAGONAL_NORMAL,
    "normal-state-std": STATE_NORMAL,
    "gsde": GSDE,
    "beta": BETA,
}


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
    """Categorical choices and continuous components, all independent, with the methods of `Distribution`.

    Choices are as in `MultiCategorical`: D = sum(numbers) logits. There are C components, of the family `continuous`. dist is
    (logits (..., D), the tensors of that family). An action is (..., K + C) float32: first the value of each
    choice, which float32 holds exactly, then the components. Log-probability and entropy are sums over all of them.
    """

    numbers: tuple[int, ...]
    num_components: int  # C
    continuous: Distribution = DIAGONAL_NORMAL

    @property
    def choices(self) -> MultiCategorical:
        """The distribution of the choices."""
        return MultiCategorical(self.numbers)

    @property
    def num_logits(self) -> int:
        """D."""
        return sum(self.numbers)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Gumbel noise for the D logits, then noise for the components."""
        *batch, size = shape
        gumbel = gumbel_noise((*batch, self.num_logits), generator)
        return torch.cat([gumbel, self.continuous.noise((*batch, size - self.num_logits), generator)], -1)

    def sample(self, dist: tuple[Tensor, Tensor, Tensor], noise: Tensor) -> Tensor:
        """-> (..., K + C)."""
        logits, *rest = dist
        gumbel, other = noise.tensor_split([self.num_logits], -1)
        return self._joined(self.choices.sample(logits, gumbel), self.continuous.sample(tuple(rest), other))

    def mode(self, dist: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The modes of all. -> (..., K + C)."""
        return self._joined(self.choices.mode(dist[0]), self.continuous.mode(dist[1:]))

    def log_prob(self, dist: tuple[Tensor, Tensor, Tensor], action: Tensor) -> Tensor:
        """action (..., K + C) -> (...)."""
        chosen, numbers = action.tensor_split([len(self.numbers)], -1)
        return self.choices.log_prob(dist[0], chosen) + self.continuous.log_prob(dist[1:], numbers)

    def entropy(self, dist: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """-> (...)."""
        return self.choices.entropy(dist[0]) + self.continuous.entropy(dist[1:])

    def _joined(self, chosen: Tensor, numbers: Tensor) -> Tensor:
        return torch.cat([chosen.to(numbers.dtype), numbers], -1)


Family = Distribution | MultiCategorical | Hybrid


def parameters(out: Tensor, log_std: Tensor | None, family: Family, features: Tensor | None = None) -> Any:
    """`dist` from a network's outputs (..., A), logits first, its weights log_std, and its last hidden layer (R, F)."""
    if isinstance(family, Hybrid):
        logits, rest = out.tensor_split([family.num_logits], -1)
        return logits, *family.continuous.parameters(rest, log_std, features)
    return family.parameters(out, log_std, features) if isinstance(family, Distribution) else out


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
    """The number of logits of each choice among `size` outputs; () where there is none."""
    if isinstance(family, MultiCategorical | Hybrid):
        return family.numbers
    return () if continuous_of(family) else (size,)


def continuous_of(family: Family) -> Distribution | None:
    """The family of the continuous components; None where there are only choices."""
    if isinstance(family, Hybrid):
        return family.continuous
    return family if isinstance(family, Distribution) and family.noise is not gumbel_noise else None


def num_components(family: Family, size: int) -> int:
    """C, the number of continuous components of a network with `size` outputs."""
    continuous = continuous_of(family)
    return 0 if continuous is None else (size - sum(choices(family, size))) // continuous.num_outputs


def log_std_shape(family: Family, size: int) -> tuple[int, ...] | None:
    """Shape of the log standard deviations that are weights of a network with `size` outputs; None: there are none."""
    continuous = continuous_of(family)
    if continuous is None or not continuous.has_log_std:
        return None
    components = num_components(family, size)
    return (continuous.num_noise, components) if continuous.of_features else (components,)


def with_features(family: Family, number: int) -> Family:
    """The family for a network whose last hidden layer has so many features."""
    continuous = continuous_of(family)
    if continuous is None or not continuous.of_features:
        return family
    fitting = replace(continuous, num_noise=number)
    return replace(family, continuous=fitting) if isinstance(family, Hybrid) else fitting
