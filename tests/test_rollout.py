"""The rollout: allocated once, written in place, true to the environment; acted and learned from under the same numbers."""

import csv

import numpy as np
import pytest
import torch
from environments import Recorder, Walk
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, TrainingFault, load_policy, train
from fastppo.core.acting import act
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.ppo import MINIBATCH_METRICS, LearnConfig, learn
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
from fastppo.policy.make_network import make_network
from fastppo.policy.normalization import RunningMoments, init_moments, make_normalization, update_moments
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.step_collector import HostCollector
from fastppo.rollout.storage import allocate_rollout
from fastppo.training.setup import environment_seed
from support.learn_settings import NUMBERS, coefficients

CPU = torch.device("cpu")


class Bench:
    """A collector and a fresh policy on N copies of an environment."""

    def __init__(self, make, num_steps, num_envs, mode=AutoresetMode.NEXT_STEP, squash=False):
        vector = SyncVectorEnv([make] * num_envs, autoreset_mode=mode)
        self.vector, self.envs = vector, AutoresetEnvs(vector)
        self.action = action_spec(vector.single_action_space, squash)
        obs, keeps_final_obs = obs_spec(vector.single_observation_space), self.envs.keeps_final_obs
        self.rollout = allocate_rollout(num_steps, num_envs, obs, self.action, keeps_final_obs, CPU)
        self.collector = HostCollector(self.envs, self.rollout, obs, self.action)
        self.collector.reset(0)
        self.network = make_network(obs, self.action, TrainConfig(hidden_sizes=(16,)))
        self.params = self.network.init(torch.Generator().manual_seed(0))
        self.generator = torch.Generator().manual_seed(1)
        self.noise_shape = self.action.noise_shape(num_steps, num_envs)

    def collect(self, normalization):
        """One rollout; returns the noise that chose its actions."""
        noise = self.action.distribution.noise(self.noise_shape, self.generator)
        weights = self.network.weights(self.params)
        with torch.inference_mode():
            self.collector.collect(lambda obs, noise: act(self.network, weights, normalization, obs, noise), noise)
        return noise


def no_normalization():
    return make_normalization(None, None, torch.zeros(()), torch.ones(()))


def received(bench):
    """What the environments were handed, (T, N, ...); only for environments that received an action every step."""
    return np.stack([env.unwrapped.received for env in bench.vector.envs], 1)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_keys_shapes_and_dtypes(mode):
    """One place lists what a rollout holds; it is locked, and its batch is [T+1, N]."""
    rollout = Bench(Walk, 5, 3, mode).rollout
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in rollout.items()}
    final_obs = {"final_obs": ((6, 3, 3), torch.float32)} if mode is AutoresetMode.SAME_STEP else {}
    assert shapes == {
        "obs": ((6, 3, 3), torch.float32),
        "action": ((6, 3), torch.int64),
        "reward": ((6, 3), torch.float32),
        "terminated": ((6, 3), torch.bool),
        "truncated": ((6, 3), torch.bool),
        "valid": ((6, 3), torch.bool),
        **final_obs,
    }
    assert rollout.is_locked
    assert rollout.batch_size == (6, 3)
    assert rollout[:5].reshape(15)["obs"].data_ptr() == rollout["obs"].data_ptr()  # [B] is a view


def test_buffers_stay_where_they_are():
    """Nothing is allocated per iteration: every buffer keeps its address, which captured programs rely on."""
    bench = Bench(Walk, 6, 3)
    before = {key: value.data_ptr() for key, value in bench.rollout.items()}
    seen = []
    for _ in range(4):
        bench.collect(no_normalization())
        seen.append(bench.rollout["obs"].clone())
    assert {key: value.data_ptr() for key, value in bench.rollout.items()} == before
    assert not torch.equal(seen[0], seen[1])  # and they are written to


def test_the_last_row_becomes_the_first():
    """Row T holds the bootstrap observation, whose step is row 0 of the next rollout: none is lost, none is made twice."""
    bench = Bench(Walk, 4, 5)
    bench.collect(no_normalization())
    for _ in range(10):
        obs, valid = bench.rollout["obs"][-1].clone(), bench.rollout["valid"][-1].clone()
        bench.collect(no_normalization())
        assert torch.equal(bench.rollout["obs"][0], obs)
        assert torch.equal(bench.rollout["valid"][0], valid)


def test_actions_are_clipped_for_the_environment_only():
    """The rollout holds what was sampled, also beyond the bounds; the environment gets it clipped into them."""
    space = Box(np.array([-0.5, -3.0], np.float32), np.array([0.5, 0.1], np.float32))
    bench = Bench(lambda: Recorder(action_space=space), 5, 3)
    bench.collect(no_normalization())
    stored, handed = bench.rollout["action"][:-1].numpy(), received(bench)
    assert (np.abs(stored[..., 0]) > 0.5).any()
    assert (np.abs(stored[..., 0]) < 0.5).any()
    assert handed.dtype == np.float32
    np.testing.assert_array_equal(handed, np.clip(stored, space.low, space.high))


def test_actions_are_squashed_for_the_environment_only():
    """With squashing, 0 is the middle of the bounds, nothing leaves them, the order is kept, and the samples are stored."""
    space = Box(np.array([-1.0, 2.0], np.float32), np.array([1.0, 6.0], np.float32))
    bench = Bench(lambda: Recorder(action_space=space), 5, 3, squash=True)
    bench.collect(no_normalization())
    stored, handed = bench.rollout["action"][:-1].reshape(-1, 2).numpy(), received(bench).reshape(-1, 2)
    assert np.abs(stored).max() > 1.0
    assert (handed > space.low).all()
    assert (handed < space.high).all()
    for component in range(2):
        assert (np.argsort(stored[:, component]) == np.argsort(handed[:, component])).all()
    np.testing.assert_allclose(bench.action.to_env(torch.zeros(1, 2)), [[0.0, 4.0]])


def test_discrete_actions_that_do_not_start_at_0():
    """Discrete(4, start=3): stored 0 .. 3, handed over 3 .. 6."""
    bench = Bench(lambda: Recorder(action_space=Discrete(4, start=3)), 5, 8)
    bench.collect(no_normalization())
    stored, handed = bench.rollout["action"][:-1].numpy(), received(bench)
    assert set(stored.flatten()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(handed, stored + 3)


def test_a_float64_action_space_gets_float64():
    """The environment is handed the dtype that its space names, in the shape that it names."""
    bench = Bench(lambda: Recorder(action_space=Box(-1.0, 1.0, (2, 2), np.float64)), 5, 3)
    bench.collect(no_normalization())
    assert received(bench).dtype == np.float64
    assert received(bench).shape == (5, 3, 2, 2)
    assert bench.rollout["action"].shape == (6, 3, 4)


@pytest.mark.parametrize(
    ("dtype", "kept"), [(np.float64, torch.float32), (np.uint8, torch.uint8), (np.int64, torch.int64), (np.int8, torch.int8)]
)
def test_observation_dtypes(dtype, kept):
    """Floats become float32 once, on the way in; integers stay what they are until the network."""
    space = Box(0, 100, (2,), dtype)
    bench = Bench(lambda: Recorder(observation_space=space), 4, 3)
    bench.collect(no_normalization())
    assert bench.rollout["obs"].dtype == kept
    expected = Bench(lambda: Recorder(observation_space=space), 4, 3).vector.reset(seed=0)[0]
    np.testing.assert_array_equal(bench.rollout["obs"][0].numpy(), expected.astype(np.float32))
    moments = update_moments(init_moments((2,)), bench.rollout["obs"].flatten(0, 1), torch.ones(15))
    normalization = make_normalization({"obs": moments}, None, torch.zeros(()), torch.ones(()))
    bench.collect(normalization)  # and the policy takes them


@pytest.mark.parametrize("key", ["obs", "reward"])
def test_what_is_not_finite_is_named(key):
    """Key, environment and step of the first number that is not finite, at every place of the rollout."""
    bench = Bench(Walk, 6, 3)
    inner = bench.vector.envs[1].step
    calls = []

    def step(action):
        calls.append(action)
        obs, reward, *rest = inner(action)
        if len(calls) == 1:
            return (obs * np.nan if key == "obs" else obs), (np.inf if key == "reward" else reward), *rest
        return obs, reward, *rest

    bench.vector.envs[1].step = step
    with pytest.raises(TrainingFault, match=rf"{key} of environment 1 .* after step 0 of the rollout"):
        bench.collect(no_normalization())


@pytest.mark.parametrize("make", [Walk, lambda: Recorder(action_space=Box(-1.0, 1.0, (2,)))], ids=["discrete", "continuous"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_acting_and_learning_see_the_same_numbers(make, mode):
    """In every iteration, with statistics that move in between: acting again from the stored observations and noise gives the

    stored actions, and the first minibatch's ratio is 1.
    """
    bench = Bench(make, 16, 3, mode)
    moments = init_moments(bench.vector.single_observation_space.shape)
    adam, ratio = init_adam(bench.params), MINIBATCH_METRICS.index("ratio_deviation")
    numbers = coefficients(learning_rate=1e-2, ent_coef=0.0, gamma=0.9, gae_lambda=0.9)
    for iteration in range(5):
        normalization = make_normalization({"obs": moments}, None, torch.zeros(()), torch.ones(()))
        noise = bench.collect(normalization)
        weights = bench.network.weights(bench.params)
        again = act(bench.network, weights, normalization, bench.rollout["obs"][:-1].flatten(0, 1), noise.flatten(0, 1))
        torch.testing.assert_close(again.unflatten(0, (16, 3)), bench.rollout["action"][:-1], rtol=1e-5, atol=1e-6)
        learned = learn(
            bench.params,
            adam,
            dict(bench.rollout.items()),
            torch.stack([torch.randperm(48, generator=bench.generator) for _ in range(3)]),
            numbers,
            normalization,
            policy=bench.network,
            config=LearnConfig(
                minibatch_size=12,
                advantage_estimator="gae",
                norm_returns=False,
                clip_reward=False,
                norm_adv=True,
                clip_vloss=False,
            ),
        )
        deviation = learned.minibatch_metrics[:, ratio]
        assert deviation[0] < 1e-5, iteration
        assert deviation[-1] > 1e-3  # and later minibatches have moved, or this measured nothing
        bench.params, adam = learned.params, learned.adam
        rows = bench.rollout["obs"][:-1].flatten(0, 1), bench.rollout["valid"][:-1].flatten()
        moments = update_moments(moments, *rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"env_id": "CartPole-v1", "norm_obs": True},
        {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 60},
        {"env_id": "environments:IdentityBox-v0", "squash_actions": True, "share_backbone": True, "norm_obs": True},
        {"env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": "SameStep"}, "norm_obs": True},
    ],
    ids=lambda settings: settings["env_id"],
)
def test_ratio_is_1_on_the_first_minibatch_of_a_run(tmp_path, settings):
    """Read off a real run: with so small a target KL that any other ratio would stop the update before its first step, every

    iteration applies exactly one minibatch, whose KL estimate is 0 but for rounding.
    """
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        **{"num_envs": 4, "num_steps": 32, **settings},
        num_iterations=6,
        target_kl=1e-9,
        learning_rate=1e-2,
        eval_episodes=0,
    )
    result = train(config)
    with (result.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert [int(row["updates"]) for row in rows] == [1] * 6
    assert all(abs(float(row["approx_kl"])) < 1e-9 for row in rows)
    assert all(float(row["clipfrac"]) == 0.0 for row in rows)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_iterations_replayed_from_a_checkpoint(tmp_path, env_id):
    """Acting and learning of an iteration both see the parameters and statistics that the iteration began with.

    Two iterations of a run, made again here from the checkpoint before them with those numbers and the checkpoint's
    generators, give the parameters and statistics of the run to the bit. (The ratio alone cannot tell: `learn` computes old and
    new log-probabilities under the same statistics, whatever the actions were chosen under.)
    """
    settings = {"num_envs": 4, "num_steps": 32, "learning_rate": 1e-2, "anneal_lr": False, "norm_obs": True}
    config = TrainConfig(env_id=env_id, run_dir=str(tmp_path), num_iterations=3, eval_episodes=0, compile="off", **settings)
    train(config)
    policy = load_policy(tmp_path, "last")
    before = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    train(TrainConfig(**{**vars(config), "resume": str(tmp_path), "num_iterations": 5}))
    after = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)

    envs = AutoresetEnvs(make_gymnasium_envs(EnvConfig(env_id, 4)))
    rollout = allocate_rollout(32, 4, policy.obs, policy.action, envs.keeps_final_obs, CPU)
    collector = HostCollector(envs, rollout, policy.obs, policy.action)
    collector.reset(environment_seed(config.seed, 3))
    generators = {name: torch.Generator() for name in before["generators"]}
    for name, generator in generators.items():
        generator.set_state(before["generators"][name])
    params, adam, moments = policy.params, AdamState(**before["adam"]), RunningMoments(*before["policy"]["obs_moments"]["obs"])
    for _ in range(2):
        normalization = make_normalization({"obs": moments}, None, torch.zeros(()), torch.ones(()))
        weights = policy.network.weights(params)
        noise = policy.action.distribution.noise(policy.action.noise_shape(32, 4), generators["actions"])
        collector.collect(lambda obs, step_noise, w=weights, n=normalization: act(policy.network, w, n, obs, step_noise), noise)
        learned = learn(
            params,
            adam,
            dict(rollout.items()),
            torch.stack([torch.randperm(128, generator=generators["minibatches"]) for _ in range(config.update_epochs)]),
            coefficients(**{name: getattr(config, name) for name in NUMBERS} | {"learning_rate": 1e-2}),
            normalization,
            policy=policy.network,
            config=LearnConfig(
                minibatch_size=config.rows_per_minibatch,
                advantage_estimator=config.advantage,
                norm_returns=config.norm_returns,
                norm_adv=config.norm_adv,
                clip_reward=config.clip_reward,
                clip_vloss=config.clip_vloss,
            ),
        )
        params, adam = learned.params, learned.adam
        moments = update_moments(moments, rollout["obs"][:-1].flatten(0, 1), rollout["valid"][:-1].flatten())
    envs.close()
    assert torch.equal(params, policy.network.flatten(after["policy"]["weights"]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moments, after["policy"]["obs_moments"]["obs"], strict=True))
    assert not torch.equal(params, policy.params)
