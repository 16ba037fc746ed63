"""Adam and gradient clipping on one flat parameter buffer, as pure functions. Knows nothing of what the parameters are."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class AdamState(NamedTuple):
    """Moments of the gradient, (P,) each, and the number of steps taken, () float32."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def init_adam(params: Tensor) -> AdamState:
    """A fresh state for the flat buffer `params`, (P,)."""
    return AdamState(torch.zeros_like(params), torch.zeros_like(params), params.new_zeros(()))


def adam_step(
    params: Tensor,
    grad: Tensor,
    state: AdamState,
    learning_rate: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: Tensor | float = 1e-5,
) -> tuple[Tensor, AdamState]:
    """One step of Adam (Kingma and Ba, 2015, arXiv 1412.6980, algorithm 1), the arithmetic of torch.optim.Adam.

    Args:
        params, grad: (P,); learning_rate, eps: (). eps is 1e-5, as in OpenAI's baselines and CleanRL, not Adam's own 1e-8.

    Returns:
        New params (P,) and state; nothing is written in place.
    """
    step = state.step + 1.0
    exp_avg = torch.lerp(state.exp_avg, grad, 1.0 - beta1)
    exp_avg_sq = beta2 * state.exp_avg_sq + (1.0 - beta2) * grad.square()
    # 1 - beta^step through expm1: in float32 the plain power loses four digits of 1 - 0.999
    bias_correction1 = -torch.expm1(step * math.log(beta1))
    bias_correction2 = -torch.expm1(step * math.log(beta2))
    denominator = (exp_avg_sq / bias_correction2).sqrt() + eps
    params = params - (learning_rate / bias_correction1) * exp_avg / denominator
    return params, AdamState(exp_avg, exp_avg_sq, step)


def clip_by_global_norm(grad: Tensor, max_norm: Tensor | float) -> tuple[Tensor, Tensor]:
    """Scale `grad` (P,) to a 2-norm of at most `max_norm`, as torch's clip_grad_norm_; returns it and the norm before, ()."""
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
