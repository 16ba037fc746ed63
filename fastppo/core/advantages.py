"""Returns and advantages over a finished rollout. Knows nothing of environments, networks or configuration.

Every function takes whole (T, N) blocks. The recursions are linear, x[t] = delta[t] + decay[t] * x[t+1], and are solved
for all rows at once in ceil(log2(T)) steps: 7 rounds of whole-block operations instead of 128 dependent ones.
"""

import torch
from torch import Tensor


def reverse_linear_recurrence(decay: Tensor, delta: Tensor) -> Tensor:
    """Solve x[t] = delta[t] + decay[t] * x[t+1] with x[T] = 0, for every t in [0, T).

    Recursive doubling (Hillis and Steele, 1986; Blelloch, 1990): after round k, x[t] holds the terms t .. t + 2^k - 1 and
    `decay` the product of that many factors. Where decay[t] is 0 nothing of x[t+1:] reaches x[t].

    Args:
        decay: (T, ...) float, delta: (T, ...) float of the same shape.

    Returns:
        x: (T, ...).
    """
    num_steps = delta.shape[0]
    x = delta
    span = 1
    while span < num_steps:
        x = torch.cat((x[:-span] + decay[:-span] * x[span:], x[-span:]))
        # the last `span` rows have nothing below them: their factor no longer matters, and stays as it is
        decay = torch.cat((decay[:-span] * decay[span:], decay[-span:]))
        span *= 2
    return x


def generalized_advantage(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Tensor | float,
    gae_lambda: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016, arXiv 1506.02438, equations 11, 12 and 16).

        delta[t]     = reward[t] + gamma * (1 - terminated[t]) * next_value[t] - value[t]
        advantage[t] = delta[t] + gamma * gae_lambda * (1 - done[t]) * advantage[t+1],   done = terminated | truncated

    A truncated episode is bootstrapped from the value of its final observation, a terminated one is not; nothing crosses
    the end of either.

    Tensors gamma and gae_lambda are multiplied in float32. That rounds no more than gamma itself was rounded: of advantages
    of 2048 steps 3e-6 (gamma 0.999, lambda 0.98), where gamma 0.9997 and lambda 1 already have 2e-5.

    Args:
        reward, value, next_value: (T, N) float; next_value[t] is V of the observation that action t led to, the final
            observation where the episode ended there.
        terminated, truncated: (T, N) bool. gamma, gae_lambda: ().

    Returns:
        advantage (T, N) and value_target = advantage + value (T, N).
    """
    delta = reward + gamma * next_value * ~terminated - value  # (T, N)
    decay = (gamma * gae_lambda) * (~(terminated | truncated)).to(reward.dtype)  # (T, N)
    advantage = reverse_linear_recurrence(decay, delta)
    return advantage, advantage + value


def monte_carlo_return(
    reward: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: Tensor | float
) -> Tensor:
    """Discounted reward to the end of the episode or of the rollout, whichever comes first.

        return[t] = reward[t] + gamma * (next_value[t] if truncated[t] else 0 if terminated[t] else return[t+1])

    The end of the rollout itself is not bootstrapped (return[T] = 0): that is the plain Monte-Carlo estimate. A time limit
    inside the rollout is no end of the task, so it is.

    Args:
        reward, next_value: (T, N) float, next_value in the units of the reward; terminated, truncated: (T, N) bool. gamma: ().

    Returns:
        (T, N) float.
    """
    delta = reward + gamma * next_value * (truncated & ~terminated)
    decay = gamma * (~(terminated | truncated)).to(reward.dtype)
    return reverse_linear_recurrence(decay, delta)
