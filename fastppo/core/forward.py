"""Log-probabilities, values and entropies of a rollout and of its minibatches. Knows nothing of losses.

A recurrent policy is evaluated on whole sequences, any other policy on rows. A *unit* stays together in a minibatch: it is a
row or, for a recurrent policy, all T rows of one environment.

Letters: T num_steps, N num_envs, B = T * N, S size of the recurrent state, m units of a minibatch. Shapes (m[, T]) are (m,) for
rows and (m, T) for a recurrent policy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.contracts import (
    Execution,
    Normalization,
    Obs,
    Policy,
    RecurrentPolicy,
    Weights,
    has_final_obs,
    normalize_obs,
    obs_of,
)
from fastppo.core.microbatches import scan_in_passes
from fastppo.core.recurrence import Cells
from fastppo.core.sharding import Shard


class Evaluation(NamedTuple):
    """The rollout under the parameters that acted, (T, N) each."""

    log_prob: Tensor  # of the action that was taken
    value: Tensor  # V of the observation
    next_value: Tensor  # V of the observation after the action; at the end of an episode, of the final observation


def forward(
    policy: Policy, weights: Weights, obs: Obs, episode_start: Tensor | None, rnn_state: Any, cells: Cells
) -> tuple[Any, Tensor, Any]:
    """dist and V of obs, and the recurrent state after each row.

    With episode_start None, obs is (rows, ...) and `rnn_state` is returned unchanged. A recurrent policy gets sequences, obs
    (T, n, ...) and episode_start (T, n), and the state before them, rnn_state (n, S). It returns states (T, n, S).
    """
    if episode_start is None:
        return (*policy.actor_critic(weights, obs), rnn_state)
    return cast(RecurrentPolicy, policy).unroll(weights, obs, episode_start, rnn_state, cells)


def evaluate_rollout(
    params: Tensor,
    rollout: Mapping[str, Tensor],
    obs: Obs,
    normalization: Normalization,
    policy: Policy,
    shard: Shard,
    execution: Execution,
) -> Evaluation:
    """log pi(a|s), V(s) and V(s') of all rows, in passes of at most microbatch_size rows; obs: normalised, (T+1, N, ...).

    Without a recurrent state rows are independent, and a pass may begin and end within a step. A recurrent state is carried
    from step to step.
    """
    weights, remembers = policy.weights(params), policy.rnn_state_size > 0
    # row T has no action and no end: its log-probability is computed too, and dropped
    given = {"action": rollout["action"], "obs": obs}
    rnn_state = params.new_zeros(())
    if remembers:
        given["episode_start"] = rollout["episode_start"]
        rnn_state = shard.mine(rollout["rnn_state"], 0)
    if has_final_obs(rollout):
        given["final_obs"] = normalize_obs(obs_of(rollout, "final_"), normalization)
    given = tree_map(lambda x: shard.mine(x, 1), given)  # (T+1, n, ...), n = N / workers
    num_rows, own_envs = given["action"].shape[:2].numel(), given["action"].shape[1]
    most = execution.microbatch_size or num_rows
    if remembers:
        most //= own_envs  # steps
    else:
        given = tree_map(lambda x: x.flatten(0, 1), given)  # ((T+1) * n, ...)

    def evaluate(rnn_state: Tensor, part: dict[str, Any]) -> tuple[Tensor, Tensor]:
        dist, value, states = forward(policy, weights, part["obs"], part.get("episode_start"), rnn_state, execution.cells)
        out = [policy.log_prob(dist, part["action"]), value]
        if "final_obs" in part and remembers:
            out.append(cast(RecurrentPolicy, policy).value_from_state(weights, part["final_obs"], states))
        elif "final_obs" in part:
            out.append(policy.critic(weights, part["final_obs"]))
        return states[-1] if remembers else states, torch.stack(out)

    out = scan_in_passes(execution.scan, evaluate, rnn_state, given, most)
    if not remembers:
        out = out.unflatten(1, (-1, own_envs))
    log_prob, value, *final_value = shard.gather(out, 2)  # (T+1, N) each
    next_value = value[1:]
    if final_value:
        ended = rollout["terminated"][:-1] | rollout["truncated"][:-1]
        next_value = torch.where(ended, final_value[0][:-1], next_value)
    return Evaluation(log_prob[:-1], value[:-1], next_value)


class Units(NamedTuple):
    """The inputs of the networks, by unit: each minibatch indexes them."""

    obs: Any  # an Obs: (B, ...), views if nothing was normalised, or (N, T, ...)
    action: Tensor  # (B, ...) or (N, T, ...)
    episode_start: Tensor | None  # (T, N), for a recurrent policy
    rnn_state: Tensor | None  # (N, S) before row 0, for a recurrent policy


def by_unit(x: Tensor, dim: int, remembers: bool) -> Tensor:
    """Dimensions T, N at `dim` become B or, for a recurrent policy, N, T."""
    return x.transpose(dim, dim + 1) if remembers else x.flatten(dim, dim + 1)


def make_units(rollout: Mapping[str, Tensor], obs: Obs, remembers: bool) -> Units:
    """The `Units` of a rollout. obs: the inputs of the networks, (T+1, N, ...). Copies nothing."""
    obs = tree_map(lambda x: by_unit(x[:-1], 0, remembers), obs)
    episode_start, rnn_state = (rollout["episode_start"][:-1], rollout["rnn_state"]) if remembers else (None, None)
    return Units(obs, by_unit(rollout["action"][:-1], 0, remembers), episode_start, rnn_state)


def evaluate_units(params: Tensor, index: Tensor, units: Units, policy: Policy, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    """log pi(a|s), V(s) and the entropy of pi of the units `index`, (m,): (m[, T]) each."""
    remembers = units.rnn_state is not None

    def chosen(x: Tensor) -> Tensor:
        return x[index].transpose(0, 1) if remembers else x[index]  # (T, m, ...), or (m, ...)

    weights, obs, action = policy.weights(params), tree_map(chosen, units.obs), chosen(units.action)
    if units.episode_start is None or units.rnn_state is None:
        dist, value, _ = forward(policy, weights, obs, None, None, cells)
        return policy.log_prob(dist, action), value, policy.entropy(dist)
    episode_start = units.episode_start.index_select(1, index)
    dist, value, _ = forward(policy, weights, obs, episode_start, units.rnn_state[index], cells)
    return policy.log_prob(dist, action).mT, value.mT, policy.entropy(dist).mT
