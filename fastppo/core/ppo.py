"""PPO's update (Schulman et al., 2017, arXiv 1707.06347, algorithm 1): `learn`, and its parts from top to bottom.

    evaluate the rollout -> advantages -> epochs of minibatches -> Adam

Pure functions of tensors. They draw no random numbers and never ask the host for a value, so they run unchanged eagerly,
compiled, under torch.func.vmap or on the meta device. They know nothing of environments, nor of what a policy computes.

Letters: T num_steps, N num_envs, B = T * N, M minibatch size, E update epochs, L = E * B / M minibatches, P parameters. Units,
m of them in a minibatch, and shapes (m[, T]) are those of core/forward.py: rows, or sequences of a policy with memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.adam import AdamState, adam_step, clip_by_global_norm
from fastppo.core.advantages import generalized_advantage, monte_carlo_return
from fastppo.core.compilable import Call, compilable, policy_call
from fastppo.core.contracts import (
    EAGER,
    Coefficients,
    Execution,
    LearnResult,
    Normalization,
    Obs,
    Policy,
    normalize_obs,
    obs_of,
)
from fastppo.core.forward import Evaluation, Units, by_unit, evaluate_rollout, evaluate_units, make_units
from fastppo.core.losses import (
    approximate_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    mean_and_std,
    squared_value_loss,
    standardize,
    weighted_sum,
)
from fastppo.core.microbatches import pad, split_evenly
from fastppo.core.recurrence import Cells
from fastppo.core.sharding import Shard

MINIBATCH_METRICS = (
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clipfrac",
    "grad_norm",
    "ratio_deviation",  # max |ratio - 1|: exactly 0 in the first minibatch but for rounding
    "applied",  # 1 where the minibatch moved the parameters, 0 after a KL stop
)
# means over the minibatches that moved the parameters (over all, where none did); how many did; whether everything is finite
SUMMARY = (*MINIBATCH_METRICS, "explained_variance", "updates", "finite")


@dataclass(frozen=True)
class LearnConfig:
    """The settings of PPO that change the program. Those that are plain numbers are its inputs: see `Coefficients`."""

    minibatch_size: int  # M, rows; with several ranks those of one rank
    advantage_estimator: Literal["gae", "monte-carlo"]
    norm_returns: bool
    norm_adv: bool
    clip_reward: bool
    clip_vloss: bool
    recompute_advantage: bool = False  # before each epoch, with the critic as it is by then


class Targets(NamedTuple):
    """What is learned towards."""

    advantage: Tensor  # (T, N)
    value_target: Tensor  # (T, N)
    return_mean: Tensor  # (), the next rollout's Normalization
    return_std: Tensor  # ()


class Rows(NamedTuple):
    """What the loss takes of rows beside the outputs of the networks; all of one shape."""

    old_log_prob: Tensor
    advantage: Tensor
    value_target: Tensor
    old_value: Tensor
    weight: Tensor  # (T, N): 1 for a transition, 0 for a resetting step; in a minibatch: see `make_minibatches`


class Minibatch(NamedTuple):
    """One minibatch, or all L of them with a leading axis. K is the number of parts that one is learned from in turn."""

    unit: Tensor  # (K, m / K) int64, which units of the rollout
    rows: Tensor  # (K, 5, m / K[, T]), the fields of Rows
    num_transitions: Tensor  # ()


class EpochState(NamedTuple):
    """What an epoch hands to the next."""

    params: Tensor  # (P,)
    adam: AdamState
    running: Tensor  # () bool, False after a KL stop
    return_mean: Tensor  # (), as in Normalization
    return_std: Tensor  # ()
    old_log_prob: Tensor  # (T, N), of the first epoch


def _calls_of_learn(
    params: Tensor, adam: AdamState, rollout: Mapping[str, Tensor], *_: Any, policy: Policy, **__: Any
) -> list[Call]:
    return [policy_call(policy, params, tree_map(lambda rows: rows[0], obs_of(rollout)))]


@compilable(_calls_of_learn, LearnResult.from_tensors)
def learn(
    params: Tensor,
    adam: AdamState,
    rollout: Mapping[str, Tensor],
    permutation: Tensor,
    coefficients: Coefficients,
    normalization: Normalization,
    worker: Tensor | None = None,
    *,
    policy: Policy,
    config: LearnConfig,
    execution: Execution = EAGER,
) -> LearnResult:
    """One iteration's whole update: values and advantages of the rollout, then E epochs of minibatches.

    With recompute_advantage each epoch begins with values and advantages of its own, from the critic as it is by then
    (Andrychowicz et al., 2021, arXiv 2006.05990, section 3.5). The ratio stays that to the policy that acted.

    Several workers and ranks can share one update, see `Shard`; num_workers divides N and the units of a minibatch. T, N, B and
    M are those of one rank. All return the same, which is the result of one call with everything, but for rounding.

    Args:
        params: (P,), the parameters that acted. adam: their optimiser state.
        rollout: `obs` (T+1, N, ...), or its leaves (see `obs_of`), and, for t < T, `action reward terminated truncated valid`
            (T+1, N, ...), row T unused; `final_obs` as `obs` where the environment resets within the step (see
            fastppo/envs/autoreset.py). For a policy with memory `episode_start` (T+1, N) bool, an episode's first observation,
            and `rnn_state` (N, S), before row 0.
        permutation: (E, B) int64, each row one of range(B); of a policy with memory (E, N), of range(N). worker: see `Shard`.

    Returns:
        `LearnResult`: new parameters and state. Nothing is written in place. Raises ValueError as `Shard`.
    """
    shard, remembers = Shard.of(worker, execution), policy.rnn_state_size > 0
    with torch.no_grad():
        obs = normalize_obs(obs_of(rollout), normalization)  # (T+1, N, ...)
        units = make_units(rollout, obs, remembers)
        valid = rollout["valid"][:-1].to(params.dtype)  # (T, N)
    cells = execution.cells
    loss = partial(loss_of_units, units=units, policy=policy, cells=cells, coefficients=coefficients, config=config)
    gradient = partial(minibatch_gradient, loss=loss, shard=shard, execution=execution)
    step = partial(minibatch_step, gradient=gradient, coefficients=coefficients)
    epochs = partial(learn_epochs, rollout=rollout, obs=obs, valid=valid, normalization=normalization, policy=policy)
    epochs = partial(epochs, step=step, coefficients=coefficients, config=config, shard=shard, execution=execution)
    running = torch.ones((), dtype=torch.bool, device=params.device)
    state = EpochState(params, adam, running, normalization.return_mean, normalization.return_std, torch.zeros_like(valid))
    if config.recompute_advantage:
        is_first = torch.arange(len(permutation), device=params.device) == 0
        state, (metrics, explained) = execution.scan(epochs, state, (permutation, is_first))
        metrics, explained = metrics.flatten(0, 1), explained[0]
    else:
        state, (metrics, explained) = epochs(state, (permutation, running))  # all of them, with the first: running is true
    with torch.no_grad():
        summary = summarize(metrics, explained, state.params)
    return LearnResult(state.params, state.adam, metrics, explained, state.return_mean, state.return_std, summary)


def learn_epochs(
    state: EpochState,
    x: tuple[Tensor, ...],
    rollout: Mapping[str, Tensor],
    obs: Obs,
    valid: Tensor,
    normalization: Normalization,
    policy: Policy,
    step: Callable[..., Any],
    coefficients: Coefficients,
    config: LearnConfig,
    shard: Shard,
    execution: Execution,
) -> tuple[EpochState, tuple[Tensor, Tensor]]:
    """Values and advantages of the whole rollout under the parameters as they are, then the minibatches of x's epochs.

    x: permutations of `learn`, of one epoch (B,) or of all (E, B); whether it is the first, () bool. Its log-probabilities are
    those that the policy acted with, and stay. step: `minibatch_step`.

    Returns:
        The new state; metrics (L, M) and the explained variance, ().
    """
    permutation, is_first = x
    with torch.no_grad():
        normalization = normalization._replace(return_mean=state.return_mean, return_std=state.return_std)
        evaluation = evaluate_rollout(state.params, rollout, obs, normalization, policy, shard, execution)
        targets = estimate_advantages(evaluation, rollout, coefficients, normalization, config, shard)
        value, value_target = evaluation.value * state.return_std, targets.value_target * targets.return_std  # in one unit
        explained = explained_variance(value, value_target, valid, shard.sum_over_ranks)
        old_log_prob = torch.where(is_first, evaluation.log_prob, state.old_log_prob)
        rows = Rows(old_log_prob, targets.advantage, targets.value_target, evaluation.value, valid)
        minibatches = make_minibatches(permutation, rows, policy.rnn_state_size > 0, config, shard, execution)
    before = (state.params, state.adam, state.running)
    (params, adam, running), (metrics,) = execution.scan(step, before, tuple(minibatches))
    return_mean = torch.where(state.running, targets.return_mean, state.return_mean)  # a critic that learns no more
    return_std = torch.where(state.running, targets.return_std, state.return_std)  # keeps its units
    return EpochState(params, adam, running, return_mean, return_std, old_log_prob), (metrics, explained)


def estimate_advantages(
    evaluation: Evaluation,
    rollout: Mapping[str, Tensor],
    coefficients: Coefficients,
    normalization: Normalization,
    config: LearnConfig,
    shard: Shard,
) -> Targets:
    """Advantages and what the critic learns towards, from rewards r that are clipped and scaled as the settings say.

        gae:          A = sum over k of (gamma lambda)^k delta[t+k],   V_target = A + V
        monte-carlo:  V_target = R, the discounted reward to the end,   A = V_target - V

    See core/advantages.py for both. With norm_returns the critic learns (V_target - mean) / std of the rollout. Its outputs are
    translated back for the deltas and bootstraps of the next rollout. With monte-carlo, A is in the critic's units.
    """
    return_mean, return_std = normalization.return_mean, normalization.return_std
    value, next_value = (x * return_std + return_mean for x in evaluation[1:])  # in units of the reward
    reward, terminated, truncated = (rollout[key][:-1] for key in ("reward", "terminated", "truncated"))  # (T, N)
    if config.clip_reward:
        reward = reward.sign()
    if normalization.reward_scale is not None:
        reward = (reward * normalization.reward_scale).clamp(-10.0, 10.0)
    gamma = coefficients.gamma
    if config.advantage_estimator == "gae":
        advantage, value_target = generalized_advantage(
            reward, value, next_value, terminated, truncated, gamma, coefficients.gae_lambda
        )
    else:
        value_target = monte_carlo_return(reward, next_value, terminated, truncated, gamma)
    if config.norm_returns:
        valid = rollout["valid"][:-1].to(value.dtype)
        return_mean, return_std = mean_and_std(value_target, valid, total=shard.sum_over_ranks)
        value_target = (value_target - return_mean) / (return_std + 1e-8)
    if config.advantage_estimator == "monte-carlo":
        advantage = value_target - evaluation.value
    return Targets(advantage, value_target, return_mean, return_std)


def make_minibatches(
    permutation: Tensor, rows: Rows, remembers: bool, config: LearnConfig, shard: Shard, execution: Execution
) -> Minibatch:
    """This worker's part of all minibatches, from rows (T, N). They are gathered at once, so that each reads contiguous memory.

    Advantages are standardised over the transitions of a minibatch (norm_adv). Weights become shares of its mean,

        weight = valid / number of transitions in the minibatch,

    so that a sum over rows, parts, workers and ranks is the mean over all its transitions.
    """
    rows_per_unit = rows.weight.shape[0] if remembers else 1
    index = permutation.reshape(-1, config.minibatch_size // rows_per_unit)  # (L, m)
    rows = Rows(*by_unit(torch.stack(rows), 1, remembers)[:, index].unbind())  # (L, m[, T]) each
    (num_transitions,) = shard.sum_over_ranks(rows.weight.flatten(1).sum(-1))  # (L,)
    if config.norm_adv:
        advantage = standardize(rows.advantage.flatten(1), rows.weight.flatten(1), total=shard.sum_over_ranks)
        rows = rows._replace(advantage=advantage.view_as(rows.advantage))
    per_minibatch = num_transitions.clamp(min=1.0).view(-1, *(1,) * (rows.weight.ndim - 1))
    stacked = torch.stack(rows._replace(weight=rows.weight / per_minibatch), 1)  # (L, 5, m[, T])

    # parts of one size; units of weight 0, which change no sum, fill up the last one
    index, stacked = shard.mine(index, 1), shard.mine(stacked, 2)
    most = (execution.microbatch_size or config.minibatch_size) // rows_per_unit
    num_parts, size = split_evenly(index.shape[1], most)
    missing = num_parts * size - index.shape[1]
    index = pad(index, 1, missing, repeat=True).unflatten(1, (num_parts, size))
    stacked = pad(stacked, 2, missing, repeat=False).unflatten(2, (num_parts, size)).movedim(2, 1)
    return Minibatch(index.contiguous(), stacked.contiguous(), num_transitions)


def loss_of_units(
    params: Tensor,
    index: Tensor,
    rows: Tensor,
    units: Units,
    policy: Policy,
    cells: Cells,
    coefficients: Coefficients,
    config: LearnConfig,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`ppo_loss` of the units `index`, (m,), under the parameters that learn. rows: (5, m[, T]), the fields of Rows."""
    log_prob, value, entropy = evaluate_units(params, index, units, policy, cells)
    return ppo_loss(log_prob, value, entropy, Rows(*rows.unbind()), coefficients, config)


def ppo_loss(
    log_prob: Tensor, value: Tensor, entropy: Tensor, rows: Rows, coefficients: Coefficients, config: LearnConfig
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """PPO's loss (Schulman et al., 2017, equation 9, with its sign turned), E over transitions:

        loss = E[-min(r A, clip(r, 1 - c, 1 + c) A)] + vf_coef E[(V - V_target)^2] - ent_coef E[H]

    with r = pi(a|s) / pi_old(a|s), c = clip_coef, and the value loss clipped too where clip_vloss says so.

    Args:
        log_prob, value, entropy: of the rows under the parameters that learn, each of the shape of a field of `rows`.
        rows: their weights sum to 1 over a minibatch, to this part's share of it over a part.

    Returns:
        loss (); (5,): policy_loss, value_loss, entropy, approx_kl, clipfrac; max |r - 1|, (). All but the last are this part's
        share, and add up to those of the minibatch.
    """
    # rows that are no transitions may hold anything: their ratio is 1 by definition
    log_ratio = torch.where(rows.weight > 0, log_prob - rows.old_log_prob, 0.0)
    ratio = log_ratio.exp()
    policy_loss = clipped_policy_loss(ratio, rows.advantage, rows.weight, coefficients.clip_coef)
    if config.clip_vloss:
        value_loss = clipped_value_loss(value, rows.old_value, rows.value_target, rows.weight, coefficients.clip_coef)
    else:
        value_loss = squared_value_loss(value, rows.value_target, rows.weight)
    entropy = weighted_sum(entropy, rows.weight)
    loss = policy_loss + coefficients.vf_coef * value_loss - coefficients.ent_coef * entropy

    deviation = (ratio.detach() - 1.0).abs()
    clipfrac = weighted_sum(deviation > coefficients.clip_coef, rows.weight)
    approx_kl = approximate_kl(log_ratio.detach(), rows.weight)
    metrics = (policy_loss, value_loss, entropy, approx_kl, clipfrac)
    return loss, (torch.stack([metric.detach() for metric in metrics]), deviation.amax())


def minibatch_gradient(
    params: Tensor, index: Tensor, rows: Tensor, loss: Callable[..., Any], shard: Shard, execution: Execution
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d params, (P,), and the metrics (5,), () of a whole minibatch, whose parts are index (K, m / K) and rows.

    The gradient of a sum over rows is the sum of its parts' gradients. This worker goes through its own parts one after the
    other; one exchange adds those of all workers and ranks.
    """
    if len(index) == 1:
        grad, (means, deviation) = execution.grad_and_aux(loss, params, index[0], rows[0])
    else:

        def add_part(total: Tensor, part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            grad, metrics = execution.grad_and_aux(loss, params, *part)
            return total + grad, metrics

        grad, (means, deviations) = execution.scan(add_part, torch.zeros_like(params), (index, rows))
        means, deviation = means.sum(0), deviations.amax()
    grad, means, deviation = shard.sum_and_max(grad, means, largest=deviation)
    return grad, means, deviation


def minibatch_step(
    carry: tuple[Tensor, AdamState, Tensor],
    minibatch: tuple[Tensor, ...],
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor]],
    coefficients: Coefficients,
) -> tuple[tuple[Tensor, AdamState, Tensor], tuple[Tensor]]:
    """One step of Adam along the gradient of one minibatch, scaled to a norm of at most max_grad_norm.

    When the KL estimate of a minibatch passes target_kl, that minibatch and all later ones leave parameters and Adam as they
    are. A flag in the carry does it, so that shapes stay fixed and the host is not asked.

    Args:
        carry: params (P,), Adam's state, and whether no minibatch has passed target_kl yet, () bool.
        minibatch: the fields of Minibatch.

    Returns:
        The new carry, and MINIBATCH_METRICS.
    """
    params, adam, running = carry
    index, rows, num_transitions = minibatch
    grad, means, deviation = gradient(params, index, rows)
    policy_loss, value_loss, entropy, approx_kl, clipfrac = means.unbind()
    running = running & (approx_kl <= coefficients.target_kl)
    applied = running & (num_transitions > 0)  # a minibatch without one transition has no gradient to follow
    clipped_grad, grad_norm = clip_by_global_norm(grad, coefficients.max_grad_norm)
    new_params, new_adam = adam_step(params, clipped_grad, adam, coefficients.learning_rate, eps=coefficients.adam_eps)
    params = torch.where(applied, new_params, params)
    adam = AdamState(*(torch.where(applied, new, old) for new, old in zip(new_adam, adam, strict=True)))
    metrics = (policy_loss, value_loss, entropy, approx_kl, clipfrac, grad_norm, deviation, applied.to(params.dtype))
    return (params, adam, running), (torch.stack(metrics),)


def summarize(minibatch_metrics: Tensor, variance_explained: Tensor, params: Tensor) -> Tensor:
    """SUMMARY, from (L, MINIBATCH_METRICS): all that the host reads, in one tensor."""
    applied = minibatch_metrics[:, MINIBATCH_METRICS.index("applied")]
    updates = applied.sum()
    share = torch.where(updates > 0, applied / updates, 1.0 / len(applied))
    finite = minibatch_metrics.isfinite().all() & params.isfinite().all()
    means = (minibatch_metrics * share.unsqueeze(1)).sum(0)
    return torch.cat((means, torch.stack((variance_explained, updates, finite.to(means.dtype)))))
