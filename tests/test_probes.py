"""Environments with a known value and a known best action, learned in seconds: each isolates one thing that can be wrong.

After Andy Jones, "Debugging reinforcement learning systems" (2021), with a time limit added.
"""

import numpy as np
import pytest

from fastppo import TrainConfig, train


def learned(tmp_path, env_id, **settings):
    """The policy at the end of a short run."""
    settings = {"num_iterations": 30, "num_steps": 16, "hidden_sizes": (32,), "learning_rate": 1e-2, **settings}
    config = TrainConfig(
        env_id=f"environments:{env_id}", num_envs=8, seed=1, eval_episodes=0, run_dir=str(tmp_path / "run"), **settings
    )
    return train(config).policy


def test_constant_reward(tmp_path):
    """One step, reward 1: V = 1. Fails when value loss, critic gradient or optimiser are wrong."""
    policy = learned(tmp_path, "ProbeConstantReward-v0")
    assert policy.value(np.zeros(1, np.float32)) == pytest.approx(1.0, abs=0.05)


def test_reward_is_the_observation(tmp_path):
    """One step, reward = obs: V(obs) = obs. Fails when values are learned against other rows' observations."""
    policy = learned(tmp_path, "ProbeRewardIsObservation-v0")
    assert policy.value(np.array([[-1.0], [1.0]], np.float32)) == pytest.approx([-1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("advantage", ["gae", "monte-carlo"])
def test_discounting_over_two_steps(tmp_path, advantage):
    """Reward 1 on the second step: V(1) = 1, V(0) = gamma. Fails when discounting or the value of the next row is wrong.

    With monte-carlo an end of the rollout within an episode would show: 15 rows are five whole episodes and their resets.
    """
    policy = learned(tmp_path, "ProbeRewardAtTheEnd-v0", gamma=0.5, advantage=advantage, num_steps=15, num_minibatches=2)
    assert policy.value(np.array([[0.0], [1.0]], np.float32)) == pytest.approx([0.5, 1.0], abs=0.08)


def test_action_decides_the_reward(tmp_path):
    """Action 1 pays, action 0 costs. Fails when the advantage's sign, or which action it belongs to, is wrong."""
    policy = learned(tmp_path, "ProbeActionDecides-v0")
    obs = np.zeros((100, 1), np.float32)
    policy.seed(0)
    assert policy.act(obs[0]) == 1
    assert policy.act(obs, deterministic=False).mean() > 0.9
    assert policy.value(obs[0]) == pytest.approx(1.0, abs=0.15)


def test_action_meets_observation(tmp_path):
    """The right action depends on the observation. Fails when actions and observations of different rows are paired."""
    policy = learned(tmp_path, "ProbeActionMeetsObservation-v0")
    assert policy.act(np.array([[-1.0], [1.0]], np.float32)).tolist() == [0, 1]
    assert policy.value(np.array([[-1.0], [1.0]], np.float32)) == pytest.approx([1.0, 1.0], abs=0.2)


@pytest.mark.parametrize("norm_reward", [False, True])
def test_a_time_limit_is_no_end(tmp_path, norm_reward):
    """Reward 1 for ever, cut by a time limit of 4 steps: V = 1 / (1 - gamma) = 5.

    Treating the cut as a termination gives the mean of 1, 1.8, 2.44 and 2.95: about 2. Values are in the environment's units
    with normalised rewards too.
    """
    policy = learned(tmp_path, "ProbeTimeLimit-v0", gamma=0.8, num_iterations=60, num_steps=32, norm_reward=norm_reward)
    assert policy.value(np.zeros(1, np.float32)) == pytest.approx(5.0, abs=0.35)


def test_identity_of_a_number(tmp_path):
    """Discrete actions, 16-step episodes: the lit number is named every time."""
    policy = learned(tmp_path, "IdentityDiscrete-v0", gamma=0.5, norm_obs=True, num_iterations=40)
    assert policy.act(np.eye(4, dtype=np.float32)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("squash_actions", [False, True])
def test_identity_of_two_numbers(tmp_path, squash_actions):
    """Continuous actions, clipped or squashed into their bounds: the two numbers shown are said, each to 0.15."""
    policy = learned(
        tmp_path,
        "IdentityBox-v0",
        gamma=0.0,
        num_steps=64,
        num_iterations=40,
        num_minibatches=8,
        learning_rate=3e-3,
        squash_actions=squash_actions,
    )
    obs = np.random.default_rng(0).uniform(-0.7, 0.7, (200, 2)).astype(np.float32)
    action = policy.act(obs)
    assert np.abs(action - obs).max() < 0.35
    assert np.abs(action - obs).mean() < 0.1
