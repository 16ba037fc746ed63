"""Random network distillation (Burda et al., 2019, arXiv 1810.12894): how new an observation is.

A network with random weights that never change, the target, maps each observation to F features. Another one, the predictor,
learns to give the same features on the observations that are seen. Where its error is large, little like that has been seen.
Knows nothing of the networks, of rewards or of training.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.adam import AdamState, adam_step
from fastppo.core.contracts import Obs
from fastppo.core.gradient import grad_and_aux
from fastppo.core.losses import Total, alone
from fastppo.core.microbatches import scan_in_passes
from fastppo.core.scan import scan

Features = Callable[[Tensor, Obs], Tensor]  # (parameters (P,), observations (R, ...)) -> (R, F)
LEARNING_RATE = 1e-3  # of the predictor; rsl_rl's default
ROWS_PER_PASS = 1024  # that go through the networks at once without gradients


def prediction_error(features: Features, predictor: Tensor, target: Tensor, obs: Obs) -> Tensor:
    """(R,): the mean over features of (predictor's - target's)^2. predictor, target: (P,). obs: (R, ...)."""
    return (features(predictor, obs) - features(target, obs)).square().mean(-1)


def novelty(features: Features, predictor: Tensor, target: Tensor, obs: Obs) -> Tensor:
    """`prediction_error` of many rows without gradients, in passes."""

    def one_pass(nothing: Tensor, rows: Obs) -> tuple[Tensor, Tensor]:
        return nothing, prediction_error(features, predictor, target, rows).unsqueeze(0)

    with torch.no_grad():
        return scan_in_passes(scan, one_pass, predictor.new_zeros(()), obs, ROWS_PER_PASS).squeeze(0)


def distill(
    features: Features,
    predictor: Tensor,
    target: Tensor,
    adam: AdamState,
    obs: Obs,
    weight: Tensor,
    num_minibatches: int,
    total: Total = alone,
) -> tuple[Tensor, AdamState]:
    """One pass of the predictor over a rollout, a step of Adam along the gradient of the mean error of each minibatch.

    Minibatch k of K is steps k, k + K, k + 2 K and so on of all environments.

    Args:
        predictor, target: (P,). adam: the predictor's. obs: (T, N, ...). weight: (T, N), 1 for a transition, 0 for other rows.
        total: sums over all processes if each has a part of the rows; all get the same parameters.

    Returns:
        The new predictor and its Adam state. Nothing is written in place.
    """

    def loss(params: Tensor, weight: Tensor, obs: Obs) -> tuple[Tensor, None]:
        return (prediction_error(features, params, target, obs) * weight).sum(), None

    number = min(num_minibatches, len(weight))
    for first in range(number):
        rows, counts = tree_map(lambda x, first=first: x[first::number].flatten(0, 1), (obs, weight))
        grad, _ = grad_and_aux(partial(loss, obs=rows), predictor, counts)
        grad, num_rows = total(grad, counts.sum())
        predictor, adam = adam_step(predictor, grad / num_rows.clamp(min=1.0), adam, torch.full_like(num_rows, LEARNING_RATE))
    return predictor, adam
