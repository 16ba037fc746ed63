"""PPO's loss terms and the weighted statistics under them. Knows nothing of networks, optimisers or rollouts.

A row of weight 0 is no transition (the step in which an environment resets itself). It has no influence on any result, whatever
finite number it holds. There are two kinds of functions:

- Loss terms take `weight`, each row's share of a mean, and return the weighted sum: weights of 1 / n give the mean of n rows.
  The caller divides by the number of transitions, so that parts of a minibatch add up to it.
- Statistics take `valid`, 1 for a transition and 0 for what is none, and divide by its sum. Rows may be spread over several
  processes, each with a part of them: every sum over all rows goes through `total`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Total = Callable[..., tuple[Tensor, ...]]  # (*sums) -> the same over all processes: one exchange


def alone(*sums: Tensor) -> tuple[Tensor, ...]:
    """The `Total` of one process that has all rows."""
    return sums


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """E[x], (): the sum of weight * x. x, weight: the same shape."""
    return (x * weight).sum()


def standardize(x: Tensor, valid: Tensor, eps: float = 1e-8, total: Total = alone) -> Tensor:
    """(x - mean) / (std + eps) with the sample standard deviation (n - 1), over valid rows of the last axis. (..., M)."""
    mean, std = mean_and_std(x, valid, -1, total)
    return (x - mean) / (std + eps)


def mean_and_std(x: Tensor, valid: Tensor, dim: int | None = None, total: Total = alone) -> tuple[Tensor, Tensor]:
    """Mean and sample standard deviation (n - 1) of `x` over valid rows: both (), or of size 1 along the axis `dim`."""
    return means_and_stds((x,), valid, dim, total)[0]


def means_and_stds(
    xs: Sequence[Tensor], valid: Tensor, dim: int | None = None, total: Total = alone
) -> list[tuple[Tensor, Tensor]]:
    """`mean_and_std` of several variables over the same rows; with several processes two exchanges for all of them."""
    keep = dim is not None
    rows, *sums = total(valid.sum(dim, keep), *((x * valid).sum(dim, keep) for x in xs))
    means = [x_sum / rows.clamp(min=1.0) for x_sum in sums]
    # about the mean of all rows, which takes a second exchange: sums of squares would cancel
    squares = total(*(((x - mean).square() * valid).sum(dim, keep) for x, mean in zip(xs, means, strict=True)))
    return [(mean, (square / (rows - 1.0).clamp(min=1.0)).sqrt()) for mean, square in zip(means, squares, strict=True)]


def explained_variance(value: Tensor, value_target: Tensor, valid: Tensor, total: Total = alone) -> Tensor:
    """1 - Var[value_target - value] / Var[value_target], over valid rows; nan where the targets do not vary.

    1 is a perfect critic, 0 one no better than a constant, negative worse. value, value_target, valid: one shape; returns ().
    """
    (_, error_std), (_, target_std) = means_and_stds((value_target - value, value_target), valid, None, total)
    return torch.where(target_std > 0, 1.0 - (error_std / target_std).square(), torch.nan)


def clipped_policy_loss(ratio: Tensor, advantage: Tensor, weight: Tensor, clip_coef: Tensor) -> Tensor:
    """-E[min(r A, clip(r, 1 - c, 1 + c) A)]: the clipped surrogate (Schulman et al., 2017, arXiv 1707.06347, equation 7).

    Args:
        ratio, advantage, weight: (M,); clip_coef: ().
    """
    clipped_ratio = torch.minimum(torch.maximum(ratio, 1.0 - clip_coef), 1.0 + clip_coef)
    return weighted_sum(-torch.minimum(ratio * advantage, clipped_ratio * advantage), weight)


def squared_value_loss(value: Tensor, value_target: Tensor, weight: Tensor) -> Tensor:
    """E[(V - V_target)^2] (Schulman et al., 2017, equation 9). All arguments (M,), returns ()."""
    return weighted_sum((value - value_target).square(), weight)


def clipped_value_loss(value: Tensor, old_value: Tensor, value_target: Tensor, weight: Tensor, clip_coef: Tensor) -> Tensor:
    """E[max((V - V_target)^2, (V_old + clip(V - V_old, -c, c) - V_target)^2)], as in OpenAI's baselines/ppo2.

    Args:
        value, old_value, value_target, weight: (M,); clip_coef: ().
    """
    change = torch.minimum(torch.maximum(value - old_value, -clip_coef), clip_coef)
    clipped_error = (old_value + change - value_target).square()
    return weighted_sum(torch.maximum((value - value_target).square(), clipped_error), weight)


def approximate_kl(log_ratio: Tensor, weight: Tensor) -> Tensor:
    """E[(r - 1) - log r]: unbiased, low-variance, never negative (Schulman, 2020, "Approximating KL divergence", k3)."""
    return weighted_sum(torch.expm1(log_ratio) - log_ratio, weight)
