"""Running statistics of observations and of discounted returns. Knows nothing of environments or networks.

They are frozen during an iteration and updated once between iterations. So acting and learning use the same numbers, and the
ratio of the first minibatch is 1.
"""

from collections.abc import Container, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.core.advantages import reverse_linear_recurrence
from fastppo.core.contracts import Normalization
from fastppo.core.losses import Total, alone


class RunningMoments(NamedTuple):
    """Mean and population variance of all rows so far, with the variable's shape, and the number of rows, (): all float64."""

    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not used


def init_moments(shape: tuple[int, ...], device: torch.device | str = "cpu") -> RunningMoments:
    """Moments of no data: mean 0, variance 1, count 0."""
    mean = torch.zeros(shape, dtype=torch.float64, device=device)
    return RunningMoments(mean, torch.ones_like(mean), torch.zeros((), dtype=torch.float64, device=device))


def update_moments(moments: RunningMoments, x: Tensor, weight: Tensor, total: Total = alone) -> RunningMoments:
    """Add the rows of `x` whose weight is 1 (Chan, Golub and LeVeque, 1979, pairwise combination of moments).

    Args:
        x: (R, *shape); weight: (R,), 1 for a row that counts and 0 for one that does not.
        total: sums over all processes if each has a part of the rows; all get the same moments.

    Returns:
        New moments; a batch without a counting row changes nothing.
    """
    x = x.to(torch.float64)
    weight = weight.to(torch.float64)
    rows = weight.sum()
    weight = weight.reshape(-1, *(1,) * (x.ndim - 1))
    x = torch.where(weight > 0, x, 0.0)
    rows, batch_sum = total(rows, x.sum(0))
    batch_mean = batch_sum / rows.clamp(min=1.0)
    (batch_square,) = total(((x - batch_mean).square() * weight).sum(0))
    count = moments.count + rows
    share = rows / count.clamp(min=1.0)
    difference = batch_mean - moments.mean
    mean = moments.mean + difference * share
    square = moments.var * moments.count + batch_square + difference.square() * moments.count * share
    var = torch.where(count > 0, square / count.clamp(min=1.0), moments.var)
    return RunningMoments(mean, var, count)


def inverse_std(moments: RunningMoments, eps: float = 1e-8, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 / sqrt(var + eps); 1 for no data."""
    return (moments.var + eps).rsqrt().to(dtype)


def discounted_return(reward: Tensor, done: Tensor, valid: Tensor, carry: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The running discounted reward of each environment, R[t] = gamma * (1 - done[t-1]) * R[t-1] + reward[t].

    Its standard deviation is the scale of the critic's targets; rewards are divided by it (Engstrom et al., 2020, arXiv
    2005.12729). Ends of episodes are treated as in Stable-Baselines3's VecNormalize.

    Args:
        reward (T, N) float, done and valid (T, N) bool; carry (N,): the R before row 0, 0 after an end.

    Returns:
        R (T, N) and the next carry (N,).
    """
    alive = (~done).to(reward.dtype)
    reward = torch.where(valid, reward, 0.0)
    decay = torch.cat((torch.zeros_like(alive[:1]), gamma * alive[:-1]))
    delta = torch.cat((reward[:1] + gamma * carry, reward[1:]))
    running = reverse_linear_recurrence(decay.flip(0), delta.flip(0)).flip(0)  # (T, N)
    return running, running[-1] * alive[-1]


def make_normalization(
    obs_moments: Mapping[str, RunningMoments] | None,
    reward_scale: Tensor | None,
    return_mean: Tensor,
    return_std: Tensor,
    wide: Container[str] = (),
) -> Normalization:
    """The current statistics for the programs: float32, or float64 for the leaves in `wide`.

    obs_moments: by leaf of the observation.
    """
    if obs_moments is None:
        return Normalization(None, None, reward_scale, return_mean, return_std)
    dtypes = {key: torch.float64 if key in wide else torch.float32 for key in obs_moments}
    mean = {key: moments.mean.to(dtypes[key]) for key, moments in obs_moments.items()}
    scale = {key: inverse_std(moments, dtype=dtypes[key]) for key, moments in obs_moments.items()}
    return Normalization(mean, scale, reward_scale, return_mean, return_std)
