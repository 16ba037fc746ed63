"""PPO's update, `learn`: values, advantages, then epochs of minibatches.

A pure function of tensors: it draws no random numbers, reads no configuration object and never asks the host for a value, so
it runs unchanged eagerly, compiled, under torch.func.vmap or on the meta device.

Letters: T num_steps, N num_envs, B = T * N, M minibatch size, E update epochs, P number of parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastppo.core.adam import AdamState, adam_step, clip_by_global_norm
from fastppo.core.advantages import generalized_advantage, monte_carlo_return
from fastppo.core.contracts import (
    EAGER,
    Execution,
    LearnResult,
    Normalization,
    Policy,
    RecurrentPolicy,
    Schedule,
    normalize_obs,
    obs_of,
)
from fastppo.core.losses import (
    approximate_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    mean_and_std,
    squared_value_loss,
    standardize,
)
from fastppo.core.sharding import share

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
    """The settings of PPO that stay the same throughout a run; `Schedule` has those that are annealed."""

    minibatch_size: int  # M, rows; of several ranks, of each
    gamma: float
    gae_lambda: float
    advantage_estimator: Literal["gae", "monte-carlo"]
    norm_returns: bool
    norm_adv: bool
    clip_reward: bool
    clip_vloss: bool
    vf_coef: float
    max_grad_norm: float
    target_kl: float | None
    adam_eps: float


def learn(
    params: Tensor,
    adam: AdamState,
    rollout: Mapping[str, Tensor],
    permutation: Tensor,
    schedule: Schedule,
    normalization: Normalization,
    worker: Tensor | None = None,
    *,
    policy: Policy,
    config: LearnConfig,
    execution: Execution = EAGER,
) -> LearnResult:
    """One iteration's whole update (Schulman et al., 2017, algorithm 1): values, advantages, then E epochs of minibatches.

    The acting parameters give values and log-probabilities of all rows in one forward pass each. When the KL estimate of a
    minibatch passes `target_kl`, that minibatch and all later ones leave parameters and Adam as they are: a flag in the
    carry, so shapes stay fixed and the host is not asked.

    Args:
        params: (P,), the parameters that acted. adam: their optimiser state.
        rollout: `obs` (T+1, N, ...), or its leaves (see `obs_of`), and, for t < T, `action reward terminated truncated valid`
            (T+1, N, ...), row T unused; `final_obs` as `obs` where the environment resets within the step (see
            fastppo/envs/autoreset.py). For a policy with memory `episode_start` (T+1, N) bool, an episode's first observation,
            and `rnn_state` (N, S), before row 0; a minibatch then has all T rows of M / T environments.
        permutation: (E, B) int64, each row a permutation of range(B); of a policy with memory (E, N), of range(N).
        schedule, normalization: see there.
        microbatch_size: the most rows that go through the networks at once, but at least one step of all environments, and in a
            minibatch one environment, where the policy has a memory. The rollout is evaluated, and minibatches are learned
            from, in passes of equal size (see `split_evenly`); the gradients of a minibatch's parts add up. None: all rows at
            once. The result is the same but for rounding; parts that fit a core's cache make large compiled minibatches faster
            (benchmarks/LOG.md).
        worker, num_workers, all_reduce: several calls at once, in threads of one process, can share the work. Each is given
            the whole and goes through its own part of the environments and of every minibatch's rows, with an exchange
            (`AllReduce`) where they need each other's. All return the same, which but for rounding is the result of one alone.
            num_workers divides N and minibatch_size. worker: int64, its number in [0, num_workers), the rank of its process,
            then whatever all_reduce wants.
        num_ranks: several processes can share one update too. Each is given only what is its own: the rollout of its N
            environments, and its M rows of each minibatch, as indices into that rollout; `minibatch_size` and the letters here
            are those of one of them. Statistics, gradients and metrics are of all, and all return the same.

    Returns:
        `LearnResult`: new parameters and state, nothing written in place.

    Raises:
        ValueError: there is no `worker` where there are several.
    """
    if worker is None and execution.num_workers * execution.num_ranks > 1:
        raise ValueError(
            f"num_workers={execution.num_workers} and num_ranks={execution.num_ranks} need `worker`, "
            "which part of the rows is this call's"
        )
    num_steps = rollout["action"].shape[0] - 1
    remembers, recurrent = policy.rnn_state_size > 0, cast(RecurrentPolicy, policy)
    rows_per_unit = num_steps if remembers else 1  # of what stays together in a minibatch

    def mine(x: Tensor, dim: int) -> Tensor:
        return share(x, dim, worker, execution.num_workers)

    def reduced(x: Tensor, over_ranks: bool) -> Tensor:
        """The sum of the x of all workers, of this process or of all."""
        assert execution.all_reduce is not None
        assert worker is not None
        return execution.all_reduce(x, worker, over_ranks)

    def total(*sums: Tensor) -> tuple[Tensor, ...]:
        """The sums over all ranks of what each worker of a rank has in full: one exchange."""
        if execution.num_ranks == 1:
            return sums
        flat = torch.cat([x.reshape(-1) for x in sums])
        if worker is not None and execution.num_workers > 1:
            flat = torch.where(worker[0] == 0, flat, 0.0)  # once a rank
        parts = reduced(flat, over_ranks=True).split([x.numel() for x in sums])
        return tuple(part.view_as(x) for part, x in zip(parts, sums, strict=True))

    def units(x: Tensor, dim: int = 0) -> Tensor:
        """What minibatches are made of: rows, T and N at `dim` as B; with a memory environments, as N and T."""
        return x.transpose(dim, dim + 1) if remembers else x.flatten(dim, dim + 1)

    def judged(value_from_state: Callable[..., tuple[Tensor, Tensor]], carry: Tensor, *rows: Tensor) -> Tensor:
        """`out`, (C, T+1, N), of `carry, out = judge(carry, *rows)`, in passes of execution.microbatch_size rows.

        Each worker goes through its own environments, and carry is of those. A memory is carried from step to step; without
        one the rows are independent, and a pass may begin and end within a step.
        """
        rows = tuple(mine(x, 1) for x in rows)  # (T+1, n, ...), n = N / workers
        own_envs, items_per_pass = rows[0].shape[1], execution.microbatch_size or rows[0].shape[0] * rows[0].shape[1]
        if remembers:
            items_per_pass //= own_envs
        else:
            rows = tuple(x.flatten(0, 1) for x in rows)  # ((T+1) * n, ...)
        number = rows[0].shape[0]  # of steps, or rows
        num_passes, size = split_evenly(number, items_per_pass)
        parts = tuple(_padded(x, 0, num_passes * size - number, repeat=True).unflatten(0, (num_passes, size)) for x in rows)

        def judge_part(carry: Tensor, part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
            carry, out = value_from_state(carry, *part)
            return carry, (out,)

        _, (out,) = execution.scan(judge_part, carry, parts)
        out = out.movedim(1, 0).flatten(1, 2)[:, :number]  # without what fills up the last pass
        if not remembers:
            out = out.unflatten(1, (-1, own_envs))  # (C, T+1, n)
        if worker is None or execution.num_workers == 1:
            return out
        everyone = out.new_zeros(*out.shape[:2], execution.num_workers, out.shape[2]).index_copy(
            2, worker[:1], out.unsqueeze(2)
        )
        return reduced(everyone, over_ranks=False).flatten(2)

    obs, obs_spec = tree_flatten(normalize_obs(obs_of(rollout), normalization))  # leaves of (T+1, N, ...)
    final_obs: list[Tensor] = []
    final_spec = None
    if any(key.startswith("final_") for key in rollout.keys()):  # noqa: SIM118 (a TensorDict iterates over rows)
        final_obs, final_spec = tree_flatten(normalize_obs(obs_of(rollout, "final_"), normalization))

    def unflatten(leaves: Sequence[Tensor]) -> tuple[Any, Any]:
        """From leaves: the observations, and the final ones, None where there are none."""
        final = None if final_spec is None else tree_unflatten(leaves[len(obs) :], final_spec)
        return tree_unflatten(leaves[: len(obs)], obs_spec), final

    action = rollout["action"][:num_steps]  # (T, N, ...)
    terminated, truncated = rollout["terminated"][:num_steps], rollout["truncated"][:num_steps]  # (T, N)
    weight = rollout["valid"][:num_steps].to(params.dtype)  # (T, N), 1 for a transition and 0 for a resetting step

    with torch.no_grad():
        weights = policy.weights(params)

        def value_from_state(carry: Tensor, action: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
            obs, final_obs = unflatten(leaves)
            dist, value = policy.actor_critic(weights, obs)
            final_value = () if final_obs is None else (policy.critic(weights, final_obs),)
            return carry, torch.stack((policy.log_prob(dist, action), value, *final_value))

        def judge_in_order(rnn_state: Tensor, action: Tensor, episode_start: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
            obs, final_obs = unflatten(leaves)
            dist, value, rnn_state = recurrent.unroll(weights, obs, episode_start, rnn_state, execution.cells)
            final_value = () if final_obs is None else (recurrent.value_from_state(weights, final_obs, rnn_state),)
            return rnn_state[-1], torch.stack((policy.log_prob(dist, action), value, *final_value))

        # row T has no action and no end: its log-probability is computed for nothing, and dropped
        rows = (rollout["action"], *((rollout["episode_start"],) if remembers else ()), *obs, *final_obs)
        start = mine(rollout["rnn_state"], 0) if remembers else params.new_zeros(())
        log_prob, value, *final_value = judged(judge_in_order if remembers else value_from_state, start, *rows)  # (T+1, N) each
        log_prob, value, next_value = log_prob[:num_steps], value[:num_steps], value[1:]
        if final_value:
            next_value = torch.where(terminated | truncated, final_value[0][:num_steps], next_value)
        reward = rollout["reward"][:num_steps]
        if config.clip_reward:
            reward = reward.sign()
        if normalization.reward_scale is not None:
            reward = (reward * normalization.reward_scale).clamp(-10.0, 10.0)

        return_mean, return_std = normalization.return_mean, normalization.return_std
        if config.advantage_estimator == "gae":
            advantage, value_target = generalized_advantage(
                reward, value, next_value, terminated, truncated, config.gamma, config.gae_lambda
            )
        else:
            # the critic may speak in standardised returns: its bootstrap is translated back into rewards
            bootstrap = next_value * return_std + return_mean
            value_target = monte_carlo_return(reward, bootstrap, terminated, truncated, config.gamma)
            if config.norm_returns:
                return_mean, return_std = mean_and_std(value_target, weight, total=total)
                value_target = (value_target - return_mean) / (return_std + 1e-8)
            advantage = value_target - value
        variance_explained = explained_variance(value, value_target, weight, total)

        # the scalars of all minibatches are gathered at once, so that each minibatch reads contiguous rows
        index = permutation.reshape(-1, config.minibatch_size // rows_per_unit)  # (L, m), L = E * B / M minibatches
        scalars = units(torch.stack((log_prob, advantage, value_target, value, weight)), 1)[:, index]  # (5, L, m[, T])
        old_log_prob, advantage, value_target, old_value, weight = scalars.unbind()  # (L, m[, T]) each
        (transitions,) = total(weight.flatten(1).sum(-1))  # (L,)
        if config.norm_adv:
            advantage = standardize(advantage.flatten(1), weight.flatten(1), total=total).view_as(advantage)
        scalars = torch.stack((old_log_prob, advantage, value_target, old_value, weight), 1)  # (L, 5, m[, T])
        # each minibatch is learned from in equal parts; units of weight 0, which change no sum, fill up the last one
        own_units = config.minibatch_size // rows_per_unit // execution.num_workers
        num_parts, part_size = split_evenly(own_units, (execution.microbatch_size or config.minibatch_size) // rows_per_unit)
        missing = num_parts * part_size - own_units
        index = _padded(mine(index, 1), 1, missing, repeat=True).contiguous()
        minibatches = (index, _padded(mine(scalars, 2), 2, missing, repeat=False).contiguous(), transitions)

    obs_unit = [units(leaf[:num_steps]) for leaf in obs]  # (B, ...), views where nothing was normalised, or (N, T, ...)
    action_unit = units(action)

    def evaluated(params: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, V and entropy of the units, (m[, T]) each."""
        weights, obs, action = policy.weights(params), [leaf[index] for leaf in obs_unit], action_unit[index]
        if not remembers:
            dist, value = policy.actor_critic(weights, tree_unflatten(obs, obs_spec))
            return policy.log_prob(dist, action), value, policy.entropy(dist)
        in_order = tree_unflatten([leaf.transpose(0, 1) for leaf in obs], obs_spec)  # (T, m, ...)
        episode_start = rollout["episode_start"][:num_steps].index_select(1, index)
        dist, value, _ = recurrent.unroll(weights, in_order, episode_start, rollout["rnn_state"][index], execution.cells)
        return policy.log_prob(dist, action.transpose(0, 1)).mT, value.mT, policy.entropy(dist).mT

    def part_loss(params: Tensor, index: Tensor, scalars: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The part's share of the minibatch's loss and metrics; rows: () transitions in the whole minibatch, at least 1."""
        old_log_prob, advantage, value_target, old_value, weight = scalars.unbind()  # (units of the part[, T]) each
        row_share = weight / rows
        log_prob, value, entropy = evaluated(params, index)
        log_ratio = log_prob - old_log_prob
        # rows that are no transitions may hold anything: their ratio is 1 by definition
        log_ratio = torch.where(weight > 0, log_ratio, 0.0)
        ratio = log_ratio.exp()
        policy_loss = clipped_policy_loss(ratio, advantage, row_share, schedule.clip_coef)
        if config.clip_vloss:
            value_loss = clipped_value_loss(value, old_value, value_target, row_share, schedule.clip_coef)
        else:
            value_loss = squared_value_loss(value, value_target, row_share)
        entropy = (entropy * row_share).sum()
        loss = policy_loss + config.vf_coef * value_loss - schedule.ent_coef * entropy

        deviation = (ratio.detach() - 1.0).abs()
        clipfrac = ((deviation > schedule.clip_coef) * row_share).sum()
        approx_kl = approximate_kl(log_ratio.detach(), row_share)
        metrics = (policy_loss, value_loss, entropy, approx_kl, clipfrac, deviation.amax())
        return loss, torch.stack([metric.detach() for metric in metrics])

    def minibatch_gradient(params: Tensor, index: Tensor, scalars: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient (P,) and metrics (6,) of one minibatch: index (m,), scalars (5, m[, T]); with workers, m / workers of it.

        Both are longer by the units that fill up the last part.
        """
        if num_parts == 1:
            grad, metrics = execution.grad_and_aux(part_loss, params, index, scalars, rows)
        else:

            def add_part(total: Tensor, part: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor]]:
                grad, metrics = execution.grad_and_aux(part_loss, params, *part, rows)
                return total + grad, (metrics,)

            parts = (index.unflatten(0, (num_parts, -1)), scalars.unflatten(1, (num_parts, -1)).movedim(1, 0).contiguous())
            grad, (metrics,) = execution.scan(
                add_part, torch.zeros_like(params), parts
            )  # metrics (parts, 6): all sums but the last
            metrics = torch.cat((metrics[:, :-1].sum(0), metrics[:, -1:].amax(0)))
        if worker is not None and execution.num_workers * execution.num_ranks > 1:
            # one exchange of all: a maximum travels through a sum in a place of its worker's own
            places = torch.arange(execution.num_workers * execution.num_ranks, device=params.device)
            place = worker[0] if execution.num_ranks == 1 else worker[1] * execution.num_workers + worker[0]
            deviation = torch.where(places == place, metrics[-1], 0.0)
            everyone = reduced(torch.cat((grad, metrics[:-1], deviation)), over_ranks=True)
            grad, sums, deviation = everyone.split((len(params), len(metrics) - 1, len(places)))
            metrics = torch.cat((sums, deviation.amax(0, keepdim=True)))
        return grad, metrics

    def step(
        carry: tuple[Tensor, AdamState, Tensor], minibatch: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, AdamState, Tensor], tuple[Tensor]]:
        params, adam, running = carry  # running: () bool, false once the KL stop has fired
        index, scalars, transitions = minibatch
        grad, metrics = minibatch_gradient(params, index, scalars, transitions.clamp(min=1.0))
        policy_loss, value_loss, entropy, approx_kl, clipfrac, deviation = metrics.unbind()
        if config.target_kl is not None:
            running = running & (approx_kl <= config.target_kl)
        applied = running & (transitions > 0)  # a minibatch without one transition has no gradient to follow
        clipped_grad, grad_norm = clip_by_global_norm(grad, config.max_grad_norm)
        new_params, new_adam = adam_step(params, clipped_grad, adam, schedule.learning_rate, eps=config.adam_eps)
        params = torch.where(applied, new_params, params)
        adam = AdamState(*(torch.where(applied, new, old) for new, old in zip(new_adam, adam, strict=True)))
        y = (policy_loss, value_loss, entropy, approx_kl, clipfrac, grad_norm, deviation, applied.to(params.dtype))
        return (params, adam, running), (torch.stack(y),)

    running = torch.ones((), dtype=torch.bool, device=params.device)
    (params, adam, _), (minibatch_metrics,) = execution.scan(step, (params, adam, running), minibatches)
    with torch.no_grad():
        summary = _summary(minibatch_metrics, variance_explained, params)
    return LearnResult(params, adam, minibatch_metrics, variance_explained, return_mean, return_std, summary)


def _summary(minibatch_metrics: Tensor, variance_explained: Tensor, params: Tensor) -> Tensor:
    """See SUMMARY."""
    applied = minibatch_metrics[:, MINIBATCH_METRICS.index("applied")]
    updates = applied.sum()
    share = torch.where(updates > 0, applied / updates, 1.0 / len(applied))
    finite = minibatch_metrics.isfinite().all() & params.isfinite().all()
    means = (minibatch_metrics * share.unsqueeze(1)).sum(0)
    return torch.cat((means, torch.stack((variance_explained, updates, finite.to(means.dtype)))))


def split_evenly(number: int, most: int) -> tuple[int, int]:
    """(passes, size): `number` items in passes of one size, at most `most`, with few places left over in the last.

    passes * size >= number, and fewer than `size` places are left over. There are as few passes as possible, or one more
    where that leaves fewer places over. A `most` below 1 counts as 1.
    """
    fewest = -(-number // max(most, 1))
    sizes = [-(-number // passes) for passes in (fewest, fewest + 1)]
    size = min(sizes, key=lambda size: -number % size)  # the larger one where both leave the same
    return -(-number // size), size


def _padded(x: Tensor, dim: int, number: int, repeat: bool) -> Tensor:
    """`x` with `number` more entries at the end of `dim`: copies of its last one, or zeros. `x` itself where that is 0."""
    if number == 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    more = last if repeat else torch.zeros_like(last)
    return torch.cat((x, more.expand(*x.shape[:dim], number, *x.shape[dim + 1 :])), dim)
