"""Acting: one action for each environment, and whole rollouts of environments that are functions on tensors.

Pure functions: they draw no random numbers and never ask the host for a value. They do not know what an environment is.

Letters: T num_steps, N num_envs, P number of parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastppo.core.compilable import Call, compilable, policy_call
from fastppo.core.contracts import (
    EAGER,
    CollectResult,
    EnvStep,
    Execution,
    Normalization,
    Obs,
    Policy,
    RecurrentPolicy,
    Weights,
    normalize_obs,
)
from fastppo.core.sharding import Shard


def act(policy: Policy, weights: Weights, normalization: Normalization, obs: Obs, noise: Tensor) -> Tensor:
    """One action per environment: the policy head and a sample. `learn` computes values and log-probabilities.

    Args:
        obs: (N, *obs_shape) raw, or leaves of that by key; noise: (N, ...) as the policy's distribution wants it.

    Returns:
        action (N, *action_shape).
    """
    return policy.sample(policy.actor(weights, normalize_obs(obs, normalization)), noise)


def _calls_of_act(params: Tensor, normalization: Normalization, obs: Obs, *_: Tensor, policy: Policy) -> list[Call]:
    return [policy_call(policy, params, obs)]


@compilable(_calls_of_act)
def act_from_params(params: Tensor, normalization: Normalization, obs: Obs, noise: Tensor, *, policy: Policy) -> Tensor:
    """`act` with the flat buffer (P,) instead of its views: one tensor to hand to a compiled program instead of a dozen."""
    return act(policy, policy.weights(params), normalization, obs, noise)


def act_recurrent(
    policy: RecurrentPolicy,
    weights: Weights,
    normalization: Normalization,
    obs: Obs,
    noise: Tensor,
    rnn_state: Tensor,
    episode_start: Tensor,
) -> tuple[Tensor, Tensor]:
    """`act` of a policy with memory.

    Args:
        rnn_state: (N, S), after the step before.
        episode_start: (N,) bool, where obs is the first of an episode: the state before it is zero.

    Returns:
        action (N, *action_shape), and the memory after obs, (N, S).
    """
    rnn_state = torch.where(episode_start.unsqueeze(-1), 0.0, rnn_state)
    dist, rnn_state = policy.step(weights, normalize_obs(obs, normalization), rnn_state)
    return policy.sample(dist, noise), rnn_state


@compilable(_calls_of_act)
def act_recurrent_from_params(
    params: Tensor,
    normalization: Normalization,
    obs: Obs,
    noise: Tensor,
    rnn_state: Tensor,
    episode_start: Tensor,
    *,
    policy: RecurrentPolicy,
) -> tuple[Tensor, Tensor]:
    """`act_recurrent` with the flat buffer (P,) instead of its views."""
    return act_recurrent(policy, policy.weights(params), normalization, obs, noise, rnn_state, episode_start)


def _calls_of_collect(
    params: Tensor,
    normalization: Normalization,
    running: tuple[Tensor, ...],
    noise: Tensor,
    random: Tensor,
    *,
    policy: Policy,
    env_step: EnvStep,
    **_: Execution,
) -> list[Call]:
    """The calls of its first step."""
    obs = running[0]
    if policy.rnn_state_size:
        *environments, rnn_state, episode_start = running
        running, recurrent = tuple(environments), cast(RecurrentPolicy, policy)
        action, _state = act_recurrent_from_params(
            params, normalization, obs, noise[0], rnn_state, episode_start, policy=recurrent
        )
    else:
        action = act_from_params(params, normalization, obs, noise[0], policy=policy)
    return [policy_call(policy, params, obs), Call(env_step, env_step, (running, action, random[0]))]


@compilable(_calls_of_collect, CollectResult.from_tensors, CollectResult.join)
def collect(
    params: Tensor,
    normalization: Normalization,
    running: tuple[Tensor, ...],
    noise: Tensor,
    random: Tensor,
    worker: Tensor | None = None,
    *,
    policy: Policy,
    env_step: EnvStep,
    execution: Execution = EAGER,
) -> CollectResult:
    """T steps of N environments that are functions on tensors, under one policy: nothing leaves the device.

    Args:
        params: (P,).
        running: the environments between two steps: their observation (N, *obs_shape), whether their last step ended an episode
            (N,) bool, and whatever else `env_step` wants; behind that, of a policy with memory, `rnn_state` (N, S) and
            `episode_start` (N,) as `act_recurrent` takes them.
        noise: (T, N, ...) as the policy's distribution wants it. random: (T, N, K), for the environments.
        worker: as in `learn`. Each of several workers steps its own part of the environments and returns that part.
    """

    def step(running: tuple[Tensor, ...], draws: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        noise, random = draws
        obs, done = running[:2]
        # a compiled loop hands each tensor from outside to each step: params is one, the weights are a dozen (1.6 us a step)
        if policy.rnn_state_size:
            *rest, rnn_state, episode_start = running
            running = tuple(rest)
            remembering = cast(RecurrentPolicy, policy)
            action, rnn_state = act_recurrent_from_params(
                params, normalization, obs, noise, rnn_state, episode_start, policy=remembering
            )
        else:
            action = act_now(obs, noise)
        running, result = env_step(running, action, random)
        if policy.rnn_state_size:
            running = (*running, rnn_state, done)  # this step has reset those that were done
        return running, (obs, action, *result, ~done)

    act_now: Callable[[Obs, Tensor], Tensor]
    if execution.bind_act is None:
        act_now = partial(act_from_params, params, normalization, policy=policy)
    else:
        act_now = execution.bind_act(params, normalization)
    shard = Shard.of(worker, execution)
    running = tuple(shard.mine(x, 0) for x in running)
    draws = (shard.mine(noise, 1), shard.mine(random, 1))
    running, (obs, action, reward, terminated, truncated, valid) = execution.scan(step, running, draws)
    finite = obs.isfinite().all() & running[0].isfinite().all() & reward.isfinite().all()
    return CollectResult(running, obs, action, reward, terminated, truncated, valid, finite)
