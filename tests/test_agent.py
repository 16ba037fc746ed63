"""A trained policy as a user holds it: one observation or a batch, numpy or tensor, normalisation and bounds included."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.core.contracts import normalize_obs
from fastppo.policy.normalization import RunningMoments, make_normalization

SETTINGS = {
    "discrete": {"env_id": "CartPole-v1"},
    "continuous": {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True},
    "squashed": {"env_id": "Pendulum-v1", "squash_actions": True, "norm_obs": True, "share_backbone": True},
    "returns": {"env_id": "CartPole-v1", "advantage": "monte-carlo", "norm_returns": True},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def result(request, tmp_path_factory):
    """A short run of each kind."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    settings = SETTINGS[request.param]
    return train(TrainConfig(num_envs=4, num_steps=64, num_iterations=3, eval_episodes=0, run_dir=str(run_dir), **settings))


@pytest.fixture
def obs(result):
    """A batch of five."""
    space = result.policy.obs_space
    return np.random.default_rng(0).normal(size=(5, *space.shape)).astype(np.float32)


def test_one_or_a_batch_numpy_or_tensor(result, obs):
    """All four ways of asking give the same actions and values, in the kind and with the leading axis of what was asked."""
    policy = result.policy
    action, value = policy.act(obs), policy.value(obs)
    assert isinstance(action, np.ndarray)
    assert isinstance(value, np.ndarray)
    assert action.shape == (5, *policy.action.space.shape)
    assert value.shape == (5,)
    assert torch.equal(policy.act(torch.from_numpy(obs)), torch.from_numpy(action))
    assert torch.equal(policy.value(torch.from_numpy(obs)), torch.from_numpy(value))
    np.testing.assert_allclose(policy.act(obs[2]), action[2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(policy.value(obs[2]), value[2], rtol=1e-5, atol=1e-5)
    assert np.shape(policy.act(obs[2])) == policy.action.space.shape
    assert policy.value(torch.from_numpy(obs[2])).shape == ()
    np.testing.assert_allclose(policy.value(obs.astype(np.float64)), value, rtol=1e-5)


def test_actions_are_the_environments(result, obs):
    """Every action, likeliest or sampled, one or many, is in the action space."""
    space = result.policy.action.space
    for deterministic in (True, False):
        assert all(space.contains(action) for action in result.policy.act(obs, deterministic))
        one = result.policy.act(obs[0], deterministic)
        assert space.contains(one), repr(one)


def test_sampling_is_seeded_and_spread(result, obs):
    """The same seed samples the same actions; deterministic actions do not vary and sampled ones do."""
    policy = result.policy
    many = np.repeat(obs[:1], 200, 0)
    policy.seed(1)
    first, second = policy.act(many, False), policy.act(many, False)
    policy.seed(1)
    np.testing.assert_array_equal(policy.act(many, False), first)
    assert (first != second).any()
    assert len(np.unique(first, axis=0)) > 1
    assert len(np.unique(policy.act(many), axis=0)) == 1


def test_loaded_equals_trained(result, obs):
    """load_policy gives what train() returned, to the bit: weights, statistics, units of the value."""
    loaded = load_policy(str(result.run_dir))
    assert torch.equal(loaded.params, result.policy.params)
    np.testing.assert_array_equal(loaded.act(obs), result.policy.act(obs))
    np.testing.assert_array_equal(loaded.value(obs), result.policy.value(obs))
    last = load_policy(result.run_dir, "last")
    state = torch.load(result.run_dir / "checkpoints" / "last.pt", weights_only=True)["policy"]
    for name, weight in last.weights.items():
        assert torch.equal(weight, state["weights"][name])


def test_normalisation_is_included(result, obs):
    """The policy sees observations as training's programs do: normalised with the statistics of the checkpoint."""
    state = torch.load(result.run_dir / "checkpoints" / "best.pt", weights_only=True)["policy"]
    policy = load_policy(result.run_dir)
    moments = None if state["obs_moments"] is None else {"obs": RunningMoments(*state["obs_moments"]["obs"])}
    normalization = make_normalization(moments, state["reward_scale"], state["return_mean"], state["return_std"])
    seen = normalize_obs(torch.from_numpy(obs), normalization)
    dist = policy.network.actor(policy.weights, seen)
    expected = policy.action.to_env(policy.action.distribution.mode(dist)).numpy()
    np.testing.assert_array_equal(policy.act(obs), expected)
    raw = policy.action.to_env(policy.action.distribution.mode(policy.network.actor(policy.weights, torch.from_numpy(obs))))
    assert (moments is None) == np.array_equal(raw.numpy(), expected)


def test_the_policy_is_a_copy(result, obs):
    """What a caller does to the policy's parameters is no business of the checkpoint, and the other way round."""
    policy = load_policy(result.run_dir)
    before = policy.value(obs)
    other = load_policy(result.run_dir)
    other.params.zero_()
    np.testing.assert_array_equal(policy.value(obs), before)
    assert not np.array_equal(other.value(obs), before)


def test_a_wrong_shape_is_refused(result):
    """An observation of another size is an error that names both shapes, not a broadcast."""
    for shape in ((2,), (5, 9), (2, 5, *result.policy.obs_space.shape), ()):
        with pytest.raises(ValueError, match="observation of shape"):
            result.policy.act(np.zeros(shape, np.float32))


def test_the_loop_of_a_user(result):
    """The plain gymnasium loop that everyone writes takes the actions as they come."""
    env = gym.make(result.summary["env_id"])
    obs, _ = env.reset(seed=0)
    for _ in range(20):
        obs, _, terminated, truncated, _ = env.step(result.policy.act(obs))
        if terminated or truncated:
            obs, _ = env.reset()
    env.close()


def test_loading_what_is_not_there(tmp_path):
    """A UsageError that names the file, for a directory that is no run."""
    with pytest.raises(UsageError, match=r"config\.json"):
        load_policy(tmp_path)
