"""Returns and advantages, held against torchrl, Stable-Baselines3 and arithmetic done by hand."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate,
    td1_return_estimate,
    td_lambda_return_estimate,
    vec_generalized_advantage_estimate,
    vec_td1_return_estimate,
)

from fastppo.core.advantages import generalized_advantage, monte_carlo_return, reverse_linear_recurrence

SIZES = [(1, 1), (1, 4), (2, 3), (5, 1), (100, 7), (128, 8)]  # (T, N); 100 is no power of two, 128 is one


def random_rollout(num_steps, num_envs, seed, dtype=torch.float64):
    """reward, value, next_value, terminated, truncated, (T, N) each: next_value[t] is value[t+1] but where an episode ended."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(num_steps, num_envs, generator=generator, dtype=dtype)
    value_all = torch.randn(num_steps + 1, num_envs, generator=generator, dtype=dtype)
    final_value = torch.randn(num_steps, num_envs, generator=generator, dtype=dtype)
    chance = torch.rand(num_steps, num_envs, generator=generator)
    terminated = chance < 0.15
    truncated = (chance > 0.1) & (chance < 0.3)  # some rows carry both flags, as gymnasium allows
    next_value = torch.where(terminated | truncated, final_value, value_all[1:])
    return reward, value_all[:-1], next_value, terminated, truncated


def column(*numbers):
    """One environment's rows, (T, 1) float64: literals below stay exact."""
    return torch.tensor(numbers, dtype=torch.float64).unsqueeze(-1)


def flags(*numbers):
    """One environment's flags, (T, 1) bool."""
    return torch.tensor(numbers, dtype=torch.bool).unsqueeze(-1)


# --- the recurrence ---


def test_recurrence_worked_by_hand():
    """x[t] = delta[t] + decay[t] x[t+1], from the bottom row up; a zero decay cuts; decay of the last row is never used."""
    decay = column(2.0, 3.0, 0.0, 5.0, 7.0)
    delta = column(1.0, 2.0, 3.0, 4.0, 5.0)
    # x4 = 5;  x3 = 4 + 5*5 = 29;  x2 = 3 + 0*29 = 3;  x1 = 2 + 3*3 = 11;  x0 = 1 + 2*11 = 23
    assert reverse_linear_recurrence(decay, delta).squeeze(-1).tolist() == [23.0, 11.0, 3.0, 29.0, 5.0]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 100])
def test_recurrence_counts_every_term_exactly_once(num_steps):
    """The doubling rounds neither drop nor repeat a term, at lengths around powers of two: in exact integer arithmetic,

    all-one decays make x[t] the number of rows from t to the end, and decays of 2 make it 2^(T-t) - 1.
    """
    rows_left = torch.arange(num_steps, 0, -1, dtype=torch.float64).unsqueeze(-1)
    one = torch.ones(num_steps, 1, dtype=torch.float64)
    assert torch.equal(reverse_linear_recurrence(one, one), rows_left)
    if num_steps <= 33:  # 2^33 is exact in float64
        assert torch.equal(reverse_linear_recurrence(2.0 * one, one), 2.0**rows_left - 1.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 6, 13, 16, 50])
def test_recurrence_satisfies_its_definition_exactly_on_integers(num_steps):
    """Every row holds its defining equation, with no rounding to hide behind: integers with decays in {-1, 0, 1}."""
    generator = torch.Generator().manual_seed(num_steps)
    decay = torch.randint(-1, 2, (num_steps, 4, 3), generator=generator).double()
    delta = torch.randint(-9, 10, (num_steps, 4, 3), generator=generator).double()
    x = reverse_linear_recurrence(decay, delta)
    assert torch.equal(x[-1], delta[-1])
    assert torch.equal(x[:-1] - decay[:-1] * x[1:], delta[:-1])


def test_recurrence_leaves_its_arguments_alone():
    """A pure function: decay and delta are not written."""
    decay, delta = torch.full((9, 2), 0.5), torch.ones(9, 2)
    reverse_linear_recurrence(decay, delta)
    assert torch.equal(decay, torch.full((9, 2), 0.5))
    assert torch.equal(delta, torch.ones(9, 2))


# --- generalized advantage, by hand (gamma = 1/2, lambda = 1/2, so the trace decays by 1/4) ---


def test_advantage_of_a_running_episode_by_hand():
    """Without an end every row bootstraps from the next value and the trace runs through."""
    advantage, target = generalized_advantage(
        column(1.0, 2.0, 3.0), column(2.0, 4.0, 6.0), column(4.0, 6.0, 8.0), flags(0, 0, 0), flags(0, 0, 0), 0.5, 0.5
    )
    # delta0 = 1 + 4/2 - 2 = 1;  delta1 = 2 + 6/2 - 4 = 1;  delta2 = 3 + 8/2 - 6 = 1
    # A2 = 1;  A1 = 1 + 1/4 = 1.25;  A0 = 1 + 1.25/4 = 1.3125
    assert advantage.squeeze(-1).tolist() == [1.3125, 1.25, 1.0]
    # value_target = A + V
    assert target.squeeze(-1).tolist() == [3.3125, 5.25, 7.0]


def test_termination_cuts_the_bootstrap_by_hand():
    """A terminated episode is worth nothing beyond its end: neither next_value nor the rows below reach it."""
    advantage, target = generalized_advantage(
        column(1.0, 2.0, 3.0), column(2.0, 4.0, 6.0), column(4.0, 999.0, 8.0), flags(0, 1, 0), flags(0, 0, 0), 0.5, 0.5
    )
    # delta1 = 2 + 0 - 4 = -2, its trace is cut: A1 = -2;  A0 = 1 + 4/2 - 2 + (-2)/4 = 0.5;  A2 = 3 + 8/2 - 6 = 1
    assert advantage.squeeze(-1).tolist() == [0.5, -2.0, 1.0]
    assert target.squeeze(-1).tolist() == [2.5, 2.0, 7.0]


def test_truncation_bootstraps_from_the_final_observation_by_hand():
    """A time limit is no end of the task: V(final observation) = 10 enters, the rows below do not."""
    advantage, target = generalized_advantage(
        column(1.0, 2.0, 3.0), column(2.0, 4.0, 6.0), column(4.0, 10.0, 8.0), flags(0, 0, 0), flags(0, 1, 0), 0.5, 0.5
    )
    # delta1 = 2 + 10/2 - 4 = 3, cut below: A1 = 3;  A0 = 1 + 4/2 - 2 + 3/4 = 1.75;  A2 = 1
    assert advantage.squeeze(-1).tolist() == [1.75, 3.0, 1.0]
    assert target.squeeze(-1).tolist() == [3.75, 7.0, 7.0]


def test_a_step_both_terminated_and_truncated_is_terminated_by_hand():
    """Reaching a terminal state on the last allowed step is a real end: no bootstrap."""
    advantage, _ = generalized_advantage(column(2.0), column(4.0), column(10.0), flags(1), flags(1), 0.5, 0.5)
    assert advantage.item() == -2.0  # 2 + 0 - 4


# --- generalized advantage, against others ---


@pytest.mark.parametrize(
    ("oracle", "gamma", "gae_lambda"),  # exact in float32, to which torchrl rounds them
    [
        (generalized_advantage_estimate, 127 / 128, 61 / 64),
        (generalized_advantage_estimate, 0.875, 0.0),
        (generalized_advantage_estimate, 1.0, 1.0),
        (vec_generalized_advantage_estimate, 127 / 128, 61 / 64),
        (vec_generalized_advantage_estimate, 1.0, 1.0),  # at lambda 0 torchrl's vectorised twin raises
    ],
)
@pytest.mark.parametrize(("num_steps", "num_envs"), SIZES)
def test_advantage_equals_torchrl(oracle, num_steps, num_envs, gamma, gae_lambda):
    """Same advantages and targets as torchrl's loop and its vectorised twin, with both kinds of end mixed in."""
    reward, value, next_value, terminated, truncated = random_rollout(num_steps, num_envs, seed=num_steps)
    advantage, target = generalized_advantage(reward, value, next_value, terminated, truncated, gamma, gae_lambda)
    # torchrl's time axis is the last but one: (T, N) reads as N features
    expected, expected_target = oracle(
        gamma, gae_lambda, value, next_value, reward, terminated | truncated, terminated, time_dim=-2
    )
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(target, expected_target, rtol=0, atol=1e-10)


@pytest.mark.parametrize("number", [float, torch.tensor], ids=["floats", "tensors"])
def test_advantage_in_float32_is_accurate(number):
    """The doubling rounds, and factors that are float32, lose no more than its rounding against torchrl's loop in float64."""
    rollout = random_rollout(128, 8, seed=1, dtype=torch.float32)
    reward, value, next_value, terminated, truncated = rollout
    advantage, _ = generalized_advantage(*rollout, number(0.99), number(0.95))
    expected, _ = generalized_advantage_estimate(
        0.99, 0.95, value.double(), next_value.double(), reward.double(), terminated | truncated, terminated
    )
    assert advantage.dtype == torch.float32
    torch.testing.assert_close(advantage.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_steps", "num_envs"), [(1, 2), (2, 3), (5, 1), (128, 8)])
def test_advantage_equals_stable_baselines(num_steps, num_envs):
    """Same as SB3's RolloutBuffer, which knows no truncation: its collector adds gamma * V(final) to the reward."""
    gamma, gae_lambda = 0.99, 0.95
    reward, value, next_value, terminated, truncated = random_rollout(num_steps, num_envs, seed=3 + num_steps)
    advantage, target = generalized_advantage(reward, value, next_value, terminated, truncated, gamma, gae_lambda)

    done = terminated | truncated
    time_limit = truncated & ~terminated
    buffer = RolloutBuffer(
        num_steps, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), "cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=num_envs
    )
    buffer.rewards = np.where(time_limit, reward + gamma * next_value, reward)
    buffer.values = value.numpy()
    buffer.advantages = np.zeros((num_steps, num_envs))
    buffer.episode_starts = np.concatenate((np.ones((1, num_envs)), done[:-1].numpy())).astype(np.float64)
    buffer.compute_returns_and_advantage(next_value[-1], done[-1].numpy())
    np.testing.assert_allclose(advantage.numpy(), buffer.advantages, rtol=0, atol=1e-6)  # last dones pass through float32
    np.testing.assert_allclose(target.numpy(), buffer.returns, rtol=0, atol=1e-6)


# --- invariants ---


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_a_batch_with_a_cut_is_its_pieces_one_after_the_other(end):
    """Where an episode ends, the rollout falls into two that know nothing of each other."""
    reward, value, next_value, _, _ = random_rollout(40, 3, seed=11)
    terminated, truncated = torch.zeros(40, 3, dtype=torch.bool), torch.zeros(40, 3, dtype=torch.bool)
    (terminated if end == "terminated" else truncated)[16] = True
    whole = (reward, value, next_value, terminated, truncated)
    above = generalized_advantage(*(x[:17] for x in whole), 0.99, 0.95)
    below = generalized_advantage(*(x[17:] for x in whole), 0.99, 0.95)
    for one, two, both in zip(above, below, generalized_advantage(*whole, 0.99, 0.95), strict=True):
        torch.testing.assert_close(both, torch.cat((one, two)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("last", [0, 1, 6, 15, 30])
def test_nothing_leaks_over_an_end(end, last):
    """Everything after the last row of an episode may change: the rows up to it keep their bits."""
    reward, value, next_value, terminated, truncated = random_rollout(32, 4, seed=5, dtype=torch.float32)
    (terminated if end == "terminated" else truncated)[last] = True
    before = generalized_advantage(reward, value, next_value, terminated, truncated, 0.99, 0.95)
    before_return = monte_carlo_return(reward, next_value, terminated, truncated, 0.99)
    other = [x.clone() for x in (reward, value, next_value, terminated, truncated)]
    for x in other:
        x[last + 1 :] = ~x[last + 1 :] if x.dtype == torch.bool else 100.0 * x[last + 1 :] + 7.0
    after = generalized_advantage(*other, 0.99, 0.95)
    after_return = monte_carlo_return(other[0], *other[2:], 0.99)
    for x, y in (*zip(before, after, strict=True), (before_return, after_return)):
        assert torch.equal(x[: last + 1], y[: last + 1])
        assert not torch.equal(x[last + 1 :], y[last + 1 :])  # the change was one


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_the_resetting_row_may_hold_any_finite_garbage(end):
    """The row after an end is no transition (gymnasium's next-step autoreset): its reward and what it leads to reach no other.

    Its own value is V(final observation), which the truncated row above it needs, and stays.
    """
    reward, value, next_value, terminated, truncated = random_rollout(12, 2, seed=8, dtype=torch.float32)
    terminated[:], truncated[:] = False, False
    (terminated if end == "terminated" else truncated)[4] = True  # row 5 resets
    before = generalized_advantage(reward, value, next_value, terminated, truncated, 0.99, 0.95)
    before_return = monte_carlo_return(reward, next_value, terminated, truncated, 0.99)
    reward, next_value = reward.clone(), next_value.clone()
    reward[5], next_value[5] = 100.0, -1e30
    after = generalized_advantage(reward, value, next_value, terminated, truncated, 0.99, 0.95)
    after_return = monte_carlo_return(reward, next_value, terminated, truncated, 0.99)
    valid = torch.arange(12) != 5
    for x, y in (*zip(before, after, strict=True), (before_return, after_return)):
        assert torch.equal(x[valid], y[valid])


# --- Monte-Carlo returns ---


def test_monte_carlo_return_by_hand():
    """Discounted reward to the episode's end: nothing beyond termination, V(final) at a time limit, nothing at the cut."""
    reward = column(1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    next_value = column(99.0, 99.0, 10.0, 99.0, 99.0, 99.0)
    returns = monte_carlo_return(reward, next_value, flags(0, 0, 0, 1, 0, 0), flags(0, 0, 1, 0, 0, 0), 0.5)
    # t=2 is truncated: 4 + 10/2 = 9;  t=1: 2 + 9/2 = 6.5;  t=0: 1 + 6.5/2 = 4.25
    # t=3 is terminated: 8;  t=5 is the rollout's last row: 32;  t=4: 16 + 32/2 = 32
    assert returns.squeeze(-1).tolist() == [4.25, 6.5, 9.0, 8.0, 32.0, 32.0]


def test_monte_carlo_return_of_a_row_both_terminated_and_truncated_has_no_bootstrap():
    """Termination wins over a time limit on the same step."""
    assert monte_carlo_return(column(2.0), column(10.0), flags(1), flags(1), 0.5).item() == 2.0


@pytest.mark.parametrize("oracle", [td1_return_estimate, vec_td1_return_estimate, td_lambda_return_estimate])
@pytest.mark.parametrize(("num_steps", "num_envs"), SIZES)
def test_monte_carlo_return_equals_torchrl(oracle, num_steps, num_envs):
    """Same as torchrl's TD(1) and its TD(lambda) at lambda 1, once the rollout's own end is worth nothing, as here."""
    reward, _, next_value, terminated, truncated = random_rollout(num_steps, num_envs, seed=20 + num_steps)
    returns = monte_carlo_return(reward, next_value, terminated, truncated, 127 / 128)
    worth = next_value.clone()
    worth[-1] = torch.where(
        truncated[-1], worth[-1], 0.0
    )  # torchrl bootstraps the last row, a plain Monte-Carlo return does not
    extra = {"lmbda": 1.0} if oracle is td_lambda_return_estimate else {}
    expected = oracle(
        gamma=127 / 128, next_state_value=worth, reward=reward, done=terminated | truncated, terminated=terminated, **extra
    )
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-10)
