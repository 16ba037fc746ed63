"""The autoreset rule: the same MDP gives the same transitions, advantages and updates however its environments reset."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Walk
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, UsageError, train
from fastppo.core.adam import init_adam
from fastppo.core.advantages import generalized_advantage
from fastppo.core.contracts import Normalization
from fastppo.core.ppo import LearnConfig, learn
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.cartpole import SeededCartPole
from fastppo.envs.factory import EnvConfig, default_vectorization, make_gymnasium_envs
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.step_collector import HostCollector
from fastppo.rollout.storage import allocate_rollout
from support.learn_settings import coefficients

MODES = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)
OFF = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
POLICY = MLPActorCritic(3, 3, CATEGORICAL, (16, 16))


def act(obs, noise):
    """Any function of the observation alone: the same episode sees the same actions wherever its rows lie."""
    return (obs.sum(-1) * 1000).long() % 3


def walks(mode, num_envs):
    return AutoresetEnvs(SyncVectorEnv([Walk] * num_envs, autoreset_mode=mode))


def collected(envs, num_steps, iterations, seed=0):
    """Rollouts, each a dict of (T+1, N, ...) copies."""
    space, action = obs_spec(envs.envs.single_observation_space), action_spec(envs.envs.single_action_space, False)
    rollout = allocate_rollout(num_steps, envs.num_envs, space, action, envs.keeps_final_obs, torch.device("cpu"))
    collector = HostCollector(envs, rollout, space, action)
    collector.reset(seed)
    noise = torch.zeros(num_steps, *action.noise_shape(envs.num_envs))
    rollouts = []
    for _ in range(iterations):
        collector.collect(act, noise)
        rollouts.append({key: value.clone() for key, value in rollout.items()})
    envs.close()
    return rollouts


def next_obs(rollout):
    """What each action led to, (T, N, D): the row below, or where that is the next episode's, the final observation."""
    following = rollout["obs"][1:]
    if "final_obs" not in rollout:
        return following
    done = rollout["terminated"][:-1] | rollout["truncated"][:-1]
    return torch.where(done[..., None], rollout["final_obs"][:-1], following)


def transitions(rollouts, env):
    """The valid transitions of one environment in their order, as tuples of plain numbers."""
    listed = []
    for rollout in rollouts:
        led_to = next_obs(rollout)
        for t in torch.nonzero(rollout["valid"][:-1, env]).flatten().tolist():
            row = [rollout[key][t, env].tolist() for key in ("obs", "action", "reward", "terminated", "truncated")]
            listed.append((*row, led_to[t, env].tolist()))
    return listed


def test_every_mode_gives_the_same_valid_transitions():
    """Observation, action, reward, both ends and what the action led to: one sequence per environment, in every mode."""
    num_envs = 4
    by_mode = [collected(walks(mode, num_envs), num_steps=7, iterations=12) for mode in MODES]
    for env in range(num_envs):
        next_step, same_step, disabled = (transitions(rollouts, env) for rollouts in by_mode)
        assert same_step == disabled
        assert len(same_step) == 7 * 12
        assert len(next_step) < len(same_step)  # its resetting rows took some of the steps
        assert next_step == same_step[: len(next_step)]
        assert any(row[3] for row in next_step)
        assert any(row[4] for row in next_step)  # the walks end in both ways, or nothing was compared


def test_transitions_are_those_of_the_environment_itself():
    """Oracle: one Walk stepped by hand with reset() after each end. No mode may all agree on something else."""
    rollouts = collected(walks(AutoresetMode.NEXT_STEP, 3), num_steps=7, iterations=8, seed=5)
    for index in range(3):
        env = Walk()
        obs, _ = env.reset(seed=5 + index)
        for listed in transitions(rollouts, index):
            action = int(act(torch.from_numpy(obs), None))
            led_to, reward, terminated, truncated, _ = env.step(action)
            expected = (obs.tolist(), action, float(np.float32(reward)), terminated, truncated, led_to.tolist())
            assert listed == expected
            obs = env.reset()[0] if terminated or truncated else led_to


def test_every_mode_gives_the_same_advantages():
    """Over whole episodes, GAE with a critic's values is the same in every mode, from the rows that the mode keeps."""
    params = POLICY.init(torch.Generator().manual_seed(0))
    weights = POLICY.weights(params)
    num_envs, by_mode = 4, []
    for mode in MODES:
        (rollout,) = collected(walks(mode, num_envs), num_steps=80, iterations=1)
        value, next_value = POLICY.critic(weights, rollout["obs"][:-1]), POLICY.critic(weights, next_obs(rollout))
        ends = rollout["terminated"][:-1], rollout["truncated"][:-1]
        advantage, _ = generalized_advantage(rollout["reward"][:-1], value, next_value, *ends, 0.9, 0.8)
        done, valid = ends[0] | ends[1], rollout["valid"][:-1]
        last_end = [int(torch.nonzero(done[:, env]).max()) for env in range(num_envs)]
        by_mode.append([advantage[: last_end[env] + 1, env][valid[: last_end[env] + 1, env]] for env in range(num_envs)])
    for next_step, same_step, disabled in zip(*by_mode, strict=True):
        assert len(next_step) > 30
        torch.testing.assert_close(next_step, same_step[: len(next_step)])
        torch.testing.assert_close(same_step, disabled)


@pytest.mark.parametrize("advantage_estimator", ["gae", "monte-carlo"])
@pytest.mark.parametrize("seed", range(4))
def test_every_mode_gives_the_same_update(seed, advantage_estimator):
    """`learn` on the same 24 transitions moves the parameters alike, whether resetting rows lie between them or not."""
    by_mode = {}
    (rollout,) = collected(walks(AutoresetMode.SAME_STEP, 1), 24, 1, seed)
    by_mode["same step"] = rollout
    (by_mode["disabled"],) = collected(walks(AutoresetMode.DISABLED, 1), 24, 1, seed)
    resets = int((rollout["terminated"] | rollout["truncated"])[:23].sum())
    assert resets > 2
    (by_mode["next step"],) = collected(walks(AutoresetMode.NEXT_STEP, 1), 24 + resets, 1, seed)
    assert int(by_mode["next step"]["valid"][:-1].sum()) == 24

    params = POLICY.init(torch.Generator().manual_seed(seed))
    numbers = coefficients(learning_rate=1e-2, clip_coef=0.1, gamma=0.9, gae_lambda=0.8)
    learned = {}
    for mode, rollout in by_mode.items():
        rows = rollout["reward"].shape[0] - 1
        learned[mode] = learn(
            params,
            init_adam(params),
            rollout,
            torch.arange(rows).repeat(3, 1),
            numbers,
            OFF,
            policy=POLICY,
            config=LearnConfig(
                minibatch_size=rows,
                advantage_estimator=advantage_estimator,
                norm_returns=advantage_estimator == "monte-carlo",
                norm_adv=True,
                clip_reward=False,
                clip_vloss=True,
            ),
        )
    for mode in ("disabled", "next step"):
        torch.testing.assert_close(learned[mode].params, learned["same step"].params, rtol=0, atol=2e-5)
        torch.testing.assert_close(
            learned[mode].minibatch_metrics, learned["same step"].minibatch_metrics, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(learned[mode].explained_variance, learned["same step"].explained_variance)
        torch.testing.assert_close(learned[mode].return_mean, learned["same step"].return_mean)
    assert (learned["same step"].params - params).abs().max() > 1e-3


def test_valid_is_carried_over_the_end_of_a_rollout():
    """An episode that ends in the last row makes row 0 of the next rollout the resetting one, and no other row is lost."""
    rollouts = collected(walks(AutoresetMode.NEXT_STEP, 6), num_steps=3, iterations=20)
    done = torch.cat([(rollout["terminated"] | rollout["truncated"])[:-1] for rollout in rollouts])
    valid = torch.cat([rollout["valid"][:-1] for rollout in rollouts])
    assert valid[0].all()
    assert torch.equal(valid[1:], ~done[:-1])
    assert not valid[3::3].all()  # some rollout began with a resetting row, or this tested nothing


@pytest.mark.parametrize("settings", [{}, {"advantage": "monte-carlo", "norm_returns": True}], ids=["gae", "monte-carlo"])
def test_a_reward_on_the_ignored_row_changes_nothing(tmp_path, settings):
    """An environment that pays 100 while it resets trains to the same bits as one that pays 0: parameters, statistics,

    metrics, episode returns. One leak into a loss, a mean, a statistic or an advantage and they differ.
    """
    kept = []
    for bribe in (0.0, 100.0):
        result = train(
            TrainConfig(
                env_id="environments:WalkVector-v0",
                env_kwargs={"bribe": bribe},
                num_envs=4,
                num_steps=16,
                num_iterations=4,
                num_minibatches=2,
                norm_obs=True,
                norm_reward=True,
                eval_episodes=0,
                run_dir=str(tmp_path / str(bribe)),
                **settings,
            )
        )
        header, *rows = (line.split(",") for line in (result.run_dir / "metrics.csv").read_text().splitlines())
        times = {"seconds", "sps", "env_share", "act_share", "learn_share"}
        metrics = [[cell for name, cell in zip(header, row, strict=True) if name not in times] for row in rows]
        checkpoint = torch.load(result.run_dir / "checkpoints" / "last.pt", weights_only=True)
        kept.append((result.policy.params, checkpoint["return_moments"], checkpoint["policy"]["obs_moments"]["obs"], metrics))
    (params, returns, obs, metrics), (params_100, returns_100, obs_100, metrics_100) = kept
    assert torch.equal(params, params_100)
    assert all(torch.equal(a, b) for a, b in zip(returns + obs, returns_100 + obs_100, strict=True))
    assert metrics == metrics_100


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_modes_without_resetting_rows_train(tmp_path, mode):
    """The whole trainer, normalisation and logs included, on environments that keep final observations: every row counts."""
    result = train(
        TrainConfig(
            env_id="environments:WalkVector-v0",
            env_kwargs={"mode": mode},
            num_envs=4,
            num_steps=16,
            num_iterations=3,
            norm_obs=True,
            norm_reward=True,
            eval_episodes=9,
            run_dir=str(tmp_path / "run"),
        )
    )
    assert result.summary["global_step"] == 3 * 4 * 16
    assert result.summary["eval_episodes"] == 9


def test_cartpoles_own_vector_environment():
    """After an end comes one invalid row that holds the final observation, then a fresh episode near the upright."""
    assert default_vectorization(EnvConfig("CartPole-v1")) == "entry-point"
    envs = make_gymnasium_envs(EnvConfig("CartPole-v1", 4))
    assert isinstance(envs, SeededCartPole)
    (rollout,) = collected_cartpole(AutoresetEnvs(envs))
    done = (rollout["terminated"] | rollout["truncated"])[:-1]
    assert done.any()
    assert torch.equal(rollout["valid"][1:], ~done)
    ended_step, ended_env = torch.nonzero(done[:-1], as_tuple=True)
    final, first = rollout["obs"][ended_step + 1, ended_env], rollout["obs"][ended_step + 2, ended_env]
    assert (final[:, 2].abs() > 0.209).all()  # the pole fell: 12 degrees
    assert (first.abs() <= 0.05).all()
    assert (rollout["reward"][:-1][rollout["valid"][:-1]] == 1.0).all()
    assert (rollout["reward"][:-1][~rollout["valid"][:-1]] == 0.0).all()


def collected_cartpole(envs):
    """One rollout of 60 steps under a policy that always pushes to the right."""
    space, action = obs_spec(envs.envs.single_observation_space), action_spec(envs.envs.single_action_space, False)
    rollout = allocate_rollout(60, envs.num_envs, space, action, envs.keeps_final_obs, torch.device("cpu"))
    collector = HostCollector(envs, rollout, space, action)
    collector.reset(3)
    collector.collect(lambda obs, noise: torch.ones(len(obs), dtype=torch.int64), torch.zeros(60, envs.num_envs, 2))
    envs.close()
    return [rollout]


def test_async_equals_sync():
    """Environments in processes of their own give bit for bit the rows of those in this one."""
    rollouts = []
    for vectorization in ("sync", "async"):
        envs = make_gymnasium_envs(EnvConfig("environments:Walk-v0", 2, vectorization))
        assert isinstance(envs, GroupedVectorEnv) == (vectorization == "async")
        rollouts.append(collected(AutoresetEnvs(envs), num_steps=20, iterations=2, seed=11))
    for sync, other in zip(*rollouts, strict=True):
        for key, rows in sync.items():
            assert torch.equal(rows[:-1], other[key][:-1]), key


def test_an_unknown_autoreset_mode_is_refused():
    """A vector environment that resets in a way of its own is told so, instead of being trained on wrong rows."""
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")])
    envs.metadata["autoreset_mode"] = "sometimes"
    with pytest.raises(UsageError, match="sometimes"):
        AutoresetEnvs(envs)
    envs.close()
