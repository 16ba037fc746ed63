"""Short episodes: environments that fastppo makes itself are reset within the last step, so that no row is lost."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, train
from fastppo.__main__ import console
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.check import try_copy
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.preprocessing import Preprocessing
from fastppo.envs.render import make_rgb_env
from fastppo.run.metrics_file import read_rows
from support.runs import tiny
from support.short_episodes import Bandit, Short

MODULE = "support.short_episodes"


def made(num_envs=2, vectorization="sync", env_id=f"{MODULE}:Short", preprocessing=None, **kwargs):
    config = EnvConfig(env_id, num_envs, vectorization, kwargs, preprocessing or Preprocessing(), num_threads=2)
    return make_envs(EnvConfig(**{**vars(config), "autoreset": "same-step"}))


@pytest.mark.parametrize("vectorization", ["sync", "grouped", "async"])
def test_as_gymnasium_does_it(vectorization):
    """Gymnasium's SyncVectorEnv under SAME_STEP, with copies made by us of final observations that the reset overwrites."""

    class Copying(Short):
        def step(self, action):
            obs, *rest = super().step(action)
            return obs.copy(), *rest

    envs = AutoresetEnvs(made(3, vectorization, length=3, truncates=True))
    oracle = AutoresetEnvs(SyncVectorEnv([lambda: Copying(3, True)] * 3, autoreset_mode=AutoresetMode.SAME_STEP))
    try:
        np.testing.assert_array_equal(envs.reset(5), oracle.reset(5))
        for _ in range(8):
            step, expected = (one.step(np.zeros(3, np.int64)) for one in (envs, oracle))
            for name in ("obs", "reward", "terminated", "truncated", "final_obs"):
                np.testing.assert_array_equal(getattr(step, name), getattr(expected, name), err_msg=name)
    finally:
        envs.close()


def test_final_observations_by_hand():
    """Two steps an episode: (1, 1), then the final (1, 2) and the next episode's first (2, 0)."""
    envs = AutoresetEnvs(made(length=2))
    envs.reset(1)
    first, last = (envs.step(np.zeros(2, np.int64)) for _ in range(2))
    assert first.obs[0].tolist() == [2, 0]  # the array of observations is reused; this is the step after it
    assert last.final_obs.tolist() == [[1, 2]] * 2
    assert last.obs.tolist() == [[2, 0]] * 2
    assert (last.terminated.tolist(), last.truncated.tolist()) == ([True, True], [False, False])


@pytest.mark.parametrize("vectorization", ["sync", "grouped"])
def test_masks_and_parts(vectorization):
    """The mask is that of the next episode; the parts are those of the last step."""
    envs = AutoresetEnvs(
        made(2, vectorization, masked=True, parts=True, preprocessing=Preprocessing(reward_weights=(1.0, 1.0)))
    )
    try:
        _, mask = envs.reset_and_mask(1)
        assert mask.tolist() == [[True, True]] * 2
        step = envs.step(np.ones(2, np.int64))
        assert step.action_mask.tolist() == [[False, True]] * 2
        assert step.reward_parts.tolist() == [[1.0, 2.0]] * 2
        assert step.reward.tolist() == [3.0, 3.0]
    finally:
        envs.close()


def test_what_the_trial_sees():
    """Mean length of episodes of random actions, without the rows that only reset."""
    assert try_copy(Bandit, 2).episode_length == 1
    assert 3 <= try_copy(lambda: Short(3), 2).episode_length < 4  # the last episode is cut off
    assert try_copy(lambda: Short(1000), 2).episode_length == np.inf


@pytest.mark.parametrize(
    ("kwargs", "settings", "chosen"),
    [
        ({}, {}, "same-step"),
        ({}, {"vectorization": "grouped", "num_threads": 2}, "same-step"),
        ({}, {"num_seeds": 2}, "same-step"),
        ({}, {"rnn": "gru", "num_minibatches": 2}, "same-step"),
        ({}, {"compile": "on"}, "same-step"),
        ({}, {"autoreset": "next-step"}, "next-step"),
        ({}, {"check_env": False}, "auto"),
        ({"length": 12}, {}, "auto"),
    ],
    ids=str,
)
def test_every_row_is_a_transition(kwargs, settings, chosen, tmp_path):
    """All of 2 x 16 rows an iteration, or half where each second row only resets; config.json has same-step."""
    train(tiny(tmp_path / "run", env_id=f"{MODULE}:Short", env_kwargs=kwargs, num_iterations=2, eval_episodes=1, **settings))
    place = tmp_path / "run" / ("seed-2" if "num_seeds" in settings else "")
    row = read_rows(place / "metrics.csv")[-1]
    assert TrainConfig.from_json(place / "config.json").autoreset == chosen
    if not kwargs:
        assert int(row["global_step"]) == (64 if chosen == "same-step" else 32)
        assert int(row["episodes"]) == int(row["global_step"])
        assert float(row["episodic_length_mean"]) == 1


def test_a_bandit_is_learned(tmp_path):
    """From the rows after resets too."""
    settings = {"env_id": f"{MODULE}:Bandit", "num_envs": 8, "num_steps": 32, "num_iterations": 12, "learning_rate": 0.01}
    assert train(tiny(tmp_path / "run", **settings, eval_episodes=50)).summary["eval_return_mean"] > 0.9


@pytest.mark.parametrize("from_python", [False, True])
def test_a_resumed_run_is_the_same(from_python, tmp_path):
    """To the bit, with the choice of the run's start, from the command line and with the same settings from Python."""
    settings = {"env_id": f"{MODULE}:Bandit", "exact_resume": True, "checkpoint_iterations": 2, "anneal_lr": False}
    train(tiny(tmp_path / "whole", **settings))
    train(tiny(tmp_path / "half", **{**settings, "num_iterations": 2}))
    if from_python:
        train(tiny(tmp_path / "half", **settings, resume=str(tmp_path / "half")))
    else:  # with no trial
        assert console(["train", "--resume", str(tmp_path / "half"), "--num-iterations", "4", "--no-check-env"]) == 0
    whole, half = (
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True)["policy"]["weights"]
        for name in ("whole", "half")
    )
    assert all(torch.equal(weight, half[name]) for name, weight in whole.items())


def test_older_runs_go_on_as_they_began(tmp_path):
    """A config.json without the setting is of a version that reset in the next step."""
    path = tmp_path / "config.json"
    path.write_text('{"env_id": "CartPole-v1"}')
    assert TrainConfig.from_json(path).autoreset == "next-step"


def test_a_video_shows_the_last_state():
    """Environments that are rendered are reset in the next step."""
    config = EnvConfig("CartPole-v1", autoreset="same-step", vectorization="sync")
    envs = make_rgb_env(config)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    envs.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "CartPole-v1"], "--autoreset same-step is for environments that are made one by one, and these reset as"),
        (["--env-id", "CartPole-v1", "--backend", "torch"], "--autoreset same-step is for environments that are made one by"),
        (["--env-id", "support.parallel_envs"], "--autoreset same-step is for environments of one agent: leave it off"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    assert console(["train", *flags, "--autoreset", "same-step", "--plain", "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()
