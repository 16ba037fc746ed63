"""Evaluation: the command's last line, and returns that favour neither short nor long episodes."""

import json

import gymnasium as gym
import numpy as np
import pytest

from fastppo import TrainConfig, load_policy, train
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.make import make_vec
from fastppo.evaluate import console, evaluate


@pytest.fixture(scope="module")
def lengths_run(tmp_path_factory):
    """A policy for the environment whose episodes last 1 or 25 steps."""
    run_dir = tmp_path_factory.mktemp("lengths") / "run"
    config = TrainConfig(env_id="environments:Lengths-v0", num_envs=4, num_steps=16, num_iterations=1, eval_episodes=0)
    return train(TrainConfig(**{**vars(config), "run_dir": str(run_dir)})).run_dir


def episodes_by_hand(seed, num_envs, episodes):
    """Oracle: each environment alone plays its share, one episode after another."""
    returns = []
    for index in range(num_envs):
        env = gym.make("Lengths-v0")
        env.reset(seed=seed + index)
        for _ in range(episodes // num_envs + (index < episodes % num_envs)):
            total, ended = 0.0, False
            while not ended:
                _, reward, terminated, truncated, _ = env.step(0)
                total, ended = total + reward, terminated or truncated
            returns.append(total)
            env.reset()
        env.close()
    return returns


@pytest.mark.parametrize(("num_envs", "episodes"), [(8, 40), (8, 13), (3, 2), (1, 5)])
def test_short_episodes_are_not_favoured(lengths_run, num_envs, episodes):
    """Half of the episodes are short. The first K to finish would mostly be those; a share for each environment is fair."""
    envs, _ = make_vec("environments:Lengths-v0", num_envs, "auto", {})
    returns = evaluate(load_policy(lengths_run), AutoresetEnvs(envs), episodes, seed=7)
    envs.close()
    assert returns == episodes_by_hand(7, num_envs, episodes)


def test_the_last_line_is_json(lengths_run, capsys):
    """What scripts read: return_mean, return_std, episodes; the same seed gives the same line."""
    lines = []
    for seed in ("0", "0", "1"):
        assert console([str(lengths_run), "--episodes", "30", "--seed", seed]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    report = json.loads(lines[0])
    assert set(report) == {"return_mean", "return_std", "episodes"}
    returns = episodes_by_hand(0, 4, 30)  # no more environments than training had
    assert report["episodes"] == 30
    assert report["return_mean"] == pytest.approx(np.mean(returns))
    assert report["return_std"] == pytest.approx(np.std(returns))
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_every_autoreset_mode_evaluates_alike(tmp_path, mode):
    """Steps that only reset are no steps of an episode: the returns are those of next-step mode without a bribe."""
    envs, _ = make_vec("environments:WalkVector-v0", 4, "auto", {"mode": mode, "bribe": 100.0 * (mode == "NextStep")})
    reference, _ = make_vec("environments:WalkVector-v0", 4, "auto", {})
    config = TrainConfig(env_id="environments:WalkVector-v0", num_iterations=1, num_steps=8, eval_episodes=0)
    policy = train(TrainConfig(**{**vars(config), "run_dir": str(tmp_path / "run")})).policy
    assert evaluate(policy, AutoresetEnvs(envs), 20, 0) == evaluate(policy, AutoresetEnvs(reference), 20, 0)
    envs.close()
    reference.close()


def test_checkpoint_and_sampling(tmp_path, capsys):
    """--checkpoint last and --no-deterministic are honoured: a coin-flip policy scores otherwise than its mode does."""
    run_dir = tmp_path / "run"
    train(TrainConfig(num_envs=4, num_steps=32, num_iterations=2, eval_episodes=0, run_dir=str(run_dir)))
    lines = {}
    for flags in ([], ["--checkpoint", "last"], ["--no-deterministic"]):
        assert console([str(run_dir), "--episodes", "4", *flags]) == 0
        lines[" ".join(flags)] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert lines["--no-deterministic"] != lines[""]
    assert lines["--checkpoint last"]["episodes"] == 4
