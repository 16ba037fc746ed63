"""Episode statistics against gymnasium's, and every setting that changes the path through a run, trained for a moment."""

import csv
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Walk
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from fastppo import TrainConfig, train
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.errors import UsageError
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.step_collector import HostCollector
from fastppo.rollout.storage import allocate_rollout, cut_episodes, outcomes_of
from fastppo.run.episodes import EpisodeStatistics
from fastppo.training.update import adapted_factor, coefficients_at


@pytest.mark.parametrize("num_steps", [1, 3, 32])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_returns_and_lengths_are_gymnasiums(mode, num_steps):
    """Oracle: gymnasium's own per-step bookkeeping. The same episodes in the same order, however rollouts cut them."""
    if mode is AutoresetMode.SAME_STEP and tuple(map(int, gym.__version__.split(".")[:2])) < (1, 4):
        pytest.skip("the oracle knows SAME_STEP from gymnasium 1.4 on")
    recorder = RecordEpisodeStatistics(SyncVectorEnv([Walk] * 5, autoreset_mode=mode))
    envs = AutoresetEnvs(recorder)
    action = action_spec(recorder.single_action_space, False)
    space = obs_spec(recorder.single_observation_space)
    rollout = allocate_rollout(num_steps, 5, space, action, envs.keeps_final_obs, torch.device("cpu"))
    collector = HostCollector(envs, rollout, space, action)
    collector.reset(0)
    statistics, finished = EpisodeStatistics(5), 0
    for _ in range(150 // num_steps):
        collector.collect(lambda obs, noise: (obs.sum(-1) * 1000).long() % 3, torch.zeros(num_steps, 5, 3))
        outcomes = collector.outcomes()
        finished += statistics.update(outcomes.reward, outcomes.episode_end, outcomes.valid)
        assert list(statistics.returns) == pytest.approx(list(recorder.return_queue), rel=1e-5)
        assert list(statistics.lengths) == list(recorder.length_queue)
        assert statistics.episodes == finished == recorder.episode_count
    assert finished > 100  # more than the window holds
    assert len(statistics.returns) == 100
    assert statistics.return_mean == pytest.approx(np.mean(recorder.return_queue), rel=1e-5)
    assert statistics.length_mean == pytest.approx(np.mean(recorder.length_queue))


def test_by_hand():
    """Two environments, an episode over the cut, and a row that only resets and pays 100."""
    statistics = EpisodeStatistics(2)
    assert np.isnan(statistics.return_mean)
    yes, no = True, False
    reward = np.array([[1.0, 10.0], [2.0, 20.0], [100.0, 30.0]])
    done = np.array([[no, no], [yes, no], [no, no]])
    valid = np.array([[yes, yes], [yes, yes], [no, yes]])
    assert statistics.update(reward, done, valid) == 1
    assert (list(statistics.returns), list(statistics.lengths)) == ([3.0], [2])
    assert statistics.update(np.array([[5.0, 40.0]]), np.array([[yes, yes]]), np.array([[yes, yes]])) == 2
    assert (list(statistics.returns), list(statistics.lengths)) == ([3.0, 5.0, 100.0], [2, 1, 4])


def test_state_goes_through_a_checkpoint():
    """Finished episodes and what those under way have so far, as plain data; an episode goes on where it was."""
    before, after = EpisodeStatistics(1), EpisodeStatistics(1)
    before.update(np.array([[1.0], [2.0], [4.0]]), np.array([[True], [True], [False]]), np.ones((3, 1), bool))
    after.load_state_dict(before.state_dict())
    kept = {"returns": [1.0, 2.0], "lengths": [1, 1], "episodes": 2, "running_return": [4.0], "running_length": [1]}
    assert after.state_dict() == before.state_dict() == kept
    assert after.update(np.array([[8.0]]), np.array([[True]]), np.array([[True]])) == 1
    assert list(after.returns) == [1.0, 2.0, 12.0]
    assert list(before.returns) == [1.0, 2.0]  # it is no view
    with pytest.raises(ValueError, match="episodes of 1 environments, not 2"):
        EpisodeStatistics(2).load_state_dict(kept)


def test_episodes_under_way_can_be_forgotten():
    """Where environments are restarted, half an episode is none, and the next one starts from nothing."""
    episodes = EpisodeStatistics(1)
    episodes.update(np.array([[5.0]]), np.array([[False]]), np.array([[True]]))
    episodes.forget_running()
    episodes.update(np.array([[2.0]]), np.array([[True]]), np.array([[True]]))
    assert list(episodes.returns) == [2.0]
    assert list(episodes.lengths) == [1]


def trained(tmp_path, **settings):
    """The last row of metrics.csv of a run of two iterations, in numbers."""
    settings = {"num_envs": 4, "num_steps": 16, "num_iterations": 2, "eval_episodes": 0, **settings}
    result = train(TrainConfig(run_dir=str(tmp_path / "run"), **settings))
    with (result.run_dir / "metrics.csv").open(newline="") as file:
        *_, row = csv.DictReader(file)
    assert result.policy.params.isfinite().all()
    return {key: float(value) for key, value in row.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"advantage": "monte-carlo"},
        {"advantage": "monte-carlo", "norm_returns": True, "anneal_clip": True, "share_backbone": True},
        {"clip_vloss": True, "norm_adv": False, "anneal_lr": False, "ent_coef": 0.01, "activation": "relu"},
        {"env_id": "Pendulum-v1", "squash_actions": True, "share_backbone": True, "norm_obs": True, "norm_reward": True},
        {"env_id": "Pendulum-v1", "advantage": "monte-carlo", "norm_returns": True, "norm_reward": True, "clip_vloss": True},
        {"env_id": "MountainCarContinuous-v0", "vectorization": "sync", "log_std_init": -1.0, "max_grad_norm": float("inf")},
        {"env_id": "Acrobot-v1", "vectorization": "async", "num_envs": 2, "hidden_sizes": ()},
        {"env_kwargs": {"sutton_barto_reward": True}, "hidden_sizes": (8, 8, 8), "activation": "gelu"},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_every_path_trains(tmp_path, settings):
    """Each combination that takes another way through the code runs to its end with finite numbers."""
    row = trained(tmp_path, **settings)
    assert all(np.isfinite(row[key]) for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm"))
    assert row["updates"] == 16


@pytest.mark.parametrize(
    ("shape", "updates"),
    [
        ({"num_envs": 1, "num_steps": 16}, 16),
        ({"num_envs": 8, "num_steps": 1}, 16),
        ({"num_minibatches": 1}, 4),
        ({"num_minibatches": 1, "update_epochs": 1}, 1),
        ({"minibatch_size": 8}, 32),
        ({"num_envs": 1, "num_steps": 1, "num_minibatches": 1, "norm_adv": False}, 4),
        ({"num_envs": 1, "num_steps": 4, "num_minibatches": 4, "norm_adv": False}, 16),
    ],
    ids=lambda value: " ".join(f"{key}={number}" for key, number in value.items()) if isinstance(value, dict) else "",
)
def test_smallest_shapes(tmp_path, shape, updates):
    """One environment, one step, one minibatch, one row: the number of updates is E * B / M, and nothing becomes nan."""
    row = trained(tmp_path, env_id="environments:Walk-v0", norm_obs=True, norm_reward=True, **shape)
    assert row["updates"] <= updates
    assert row["updates"] > 0 or row["global_step"] < 2
    assert all(np.isfinite(row[key]) for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm"))


def test_target_kl_leaves_out_the_rest(tmp_path):
    """A KL limit that is passed early applies fewer minibatches; one that is never passed applies all."""
    assert 1 <= trained(tmp_path / "low", target_kl=1e-7, learning_rate=1e-2)["updates"] < 16
    assert trained(tmp_path / "high", target_kl=1e3)["updates"] == 16


def test_schedules(tmp_path):
    """The learning rate falls linearly with the iterations, or stands still, or follows the KL estimate."""
    assert trained(tmp_path / "falls", num_iterations=4, learning_rate=4e-3)["learning_rate"] == pytest.approx(1e-3)
    assert trained(tmp_path / "stands", anneal_lr=False, learning_rate=4e-3)["learning_rate"] == pytest.approx(4e-3)
    settings = {"num_iterations": 3, "learning_rate": 4e-3, "anneal_lr": False}
    assert trained(tmp_path / "grows", desired_kl=1.0, **settings)["learning_rate"] == pytest.approx(4e-3 * 1.5**2)
    assert trained(tmp_path / "shrinks", desired_kl=1e-7, **settings)["learning_rate"] == pytest.approx(4e-3 / 1.5**2)
    with pytest.raises(UsageError, match="--no-anneal-lr"):
        TrainConfig(desired_kl=0.01)


@pytest.mark.parametrize(
    ("rate", "approx_kl", "after"),
    [
        (1e-3, 0.021, 1e-3 / 1.5),
        (1e-3, 0.019, 1e-3),
        (1e-3, 0.006, 1e-3),
        (1e-3, 0.004, 1.5e-3),
        (1e-3, 0.0, 1e-3),
        (9e-3, 0.001, 1e-2),
        (1.2e-5, 1.0, 1e-5),
        (0.1, 0.001, 0.1),
        (1e-7, 1.0, 1e-7),
    ],
)
def test_the_learning_rate_follows_the_kl_estimate(rate, approx_kl, after):
    """A factor of 1.5 where the estimate is over twice or under half of --desired-kl, between 1e-5 and 1e-2."""
    config = TrainConfig(learning_rate=1e-3, desired_kl=0.01, anneal_lr=False)
    if not 1e-5 <= rate <= 1e-2:
        config = replace(config, learning_rate=rate)
    factor = adapted_factor(rate / config.learning_rate, approx_kl, config)
    assert factor * config.learning_rate == pytest.approx(after)


def test_the_entropy_bonus_falls_to_its_end():
    """Linearly over the run; without --ent-coef-end it stays."""
    config = TrainConfig(ent_coef=0.01, ent_coef_end=0.002)
    weights = [coefficients_at(progress, config, torch.device("cpu"), 1.0).ent_coef.item() for progress in (0.0, 0.25, 1.2)]
    assert weights == pytest.approx([0.01, 0.008, 0.002])
    assert coefficients_at(0.9, TrainConfig(ent_coef=0.01), torch.device("cpu"), 1.0).ent_coef.item() == pytest.approx(0.01)


def test_env_kwargs_reach_the_environment(tmp_path):
    """Sutton and Barto's CartPole pays 0 a step and -1 at the fall: the return is -1."""
    row = trained(tmp_path, env_kwargs={"sutton_barto_reward": True}, num_steps=64)
    assert row["episodes"] > 0
    assert row["episodic_return_mean"] == -1.0


def test_gymnasium_has_the_environments():
    """The ids that these tests train on are gymnasium's own or the test suite's."""
    assert {"Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0"} <= set(gym.registry)


def test_a_cut_ends_a_game_that_has_just_lost_a_life():
    """In the last row one game goes on, one has lost a life, one is over. Each is counted where the rollout is cut."""
    rows = {key: np.zeros((3, 3), bool) for key in ("terminated", "truncated")}
    rows |= {"reward": np.ones((3, 3), np.float32), "valid": np.ones((3, 3), bool)}
    rows["terminated"][1] = [False, True, True]
    game_over = np.array([[False] * 3, [False, False, True]])
    assert outcomes_of(rows, None, game_over).episode_end[-1].tolist() == [False, False, True]
    outcomes = outcomes_of(rows, cut_episodes(rows), game_over)
    assert outcomes.episode_end[-1].tolist() == [True, True, True]
    assert outcomes.cut.tolist() == [True, True, False]
