"""Evaluation: the command's last line, and returns that favour neither short nor long episodes."""

import json
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from fastppo import TrainConfig, load_policy, train
from fastppo.analysis.evaluation import most_steps, play_episodes
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
from fastppo.evaluate import console
from fastppo.random_streams import Stream, environment_seed
from fastppo.train import console as train_console


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
    envs = make_gymnasium_envs(EnvConfig("environments:Lengths-v0", num_envs))
    returns = play_episodes(load_policy(lengths_run), AutoresetEnvs(envs), episodes, seed=7).returns
    envs.close()
    assert returns == episodes_by_hand(environment_seed(7, Stream.EVALUATION_ENVIRONMENTS), num_envs, episodes)


def test_the_last_line_is_json(lengths_run, capsys):
    """What scripts read: return_mean, return_std, episodes; the same seed gives the same line."""
    lines = []
    for seed in ("0", "0", "2"):
        assert console([str(lengths_run), "--episodes", "30", "--seed", seed]) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    report = json.loads(lines[0])
    assert set(report) == {"return_mean", "return_std", "episodes"}
    returns = episodes_by_hand(environment_seed(0, Stream.EVALUATION_ENVIRONMENTS), 4, 30)  # no more than training had
    assert report["episodes"] == 30
    assert report["return_mean"] == pytest.approx(np.mean(returns))
    assert report["return_std"] == pytest.approx(np.std(returns))
    assert lines[0] == lines[1] != lines[2]


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_every_autoreset_mode_evaluates_alike(tmp_path, mode):
    """Steps that only reset are no steps of an episode: the returns are those of next-step mode without a bribe."""
    envs = make_gymnasium_envs(
        EnvConfig("environments:WalkVector-v0", 4, env_kwargs={"mode": mode, "bribe": 100.0 * (mode == "NextStep")})
    )
    reference = make_gymnasium_envs(EnvConfig("environments:WalkVector-v0", 4))
    config = TrainConfig(env_id="environments:WalkVector-v0", num_iterations=1, num_steps=8, eval_episodes=0)
    policy = train(TrainConfig(**{**vars(config), "run_dir": str(tmp_path / "run")})).policy
    played, expected = (play_episodes(policy, AutoresetEnvs(one), 20, 0) for one in (envs, reference))
    assert played.returns == expected.returns
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


# --- environments that do not end


class Endless(gym.Env):
    """Ends never, or in its first episode only (`ends` steps); each step pays 1."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, ends=0, render_mode=None):
        self.ends, self.elapsed, self.render_mode = ends, 0, render_mode

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 30}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        return np.zeros(2, np.float32), 1.0, self.elapsed == self.ends, False, {}

    def render(self):
        return np.zeros((4, 4, 3), np.uint8)


gym.register("Endless-v0", Endless, disable_env_checker=True)
gym.register("Later-v0", lambda: Endless(ends=40), disable_env_checker=True)


@pytest.mark.parametrize(
    ("trained", "episodes", "longest", "most"),
    [
        (512, 20, None, 20_000),  # 1,000 an episode
        (10**6, 20, None, 10**6),  # as many as were trained
        (10**9, 20, None, 2_000_000),  # 100,000 an episode
        (512, 20, 5_000, 100_000),  # a time limit of more: all may end
        (512, 20, 200, 20_000),
        (10**6, 1, 10**9, 10**5),
    ],
)
def test_how_many_steps_an_evaluation_may_take(trained, episodes, longest, most):
    """By what was trained, by the episodes asked for and by their time limit."""
    assert most_steps(trained, episodes, longest) == most


def test_no_episode_ends(tmp_path, capsys, monkeypatch):
    """Said in training and in evaluation, which is announced, told and bounded; null in JSON, exit code 0."""
    monkeypatch.setattr("fastppo.analysis.evaluation.PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("fastppo.analysis.evaluation.MIN_EPISODE_STEPS", 10)
    flags = ["--env-id", "test_evaluate:Endless-v0", "--num-envs", "2", "--num-steps", "8", "--num-iterations", "2"]
    flags += ["--compile", "off", "--run-dir", str(tmp_path / "run")]
    assert train_console(flags) == 0
    said = capsys.readouterr().out
    assert "no episode has ended in 32 steps, so there is no episodic_return_mean yet" in said
    assert "evaluating for 20 episodes, 200 steps at most\n" in said
    assert "evaluating: 0 of 20 episodes, 100 of at most 200 steps\n" in said
    assert "no episode ended in the 200 steps of the evaluation, so there is no return (1 a step)" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["eval_return_mean"], summary["eval_return_std"], summary["eval_episodes"]) == (None, None, 0)

    for extra, steps in (([], 32), (["--max-steps", "50"], 50)):
        assert console([str(tmp_path / "run"), "--episodes", "3", *extra]) == 0
        *_, remark, told, last = capsys.readouterr().out.splitlines()
        assert remark.startswith(f"no episode ended in the {steps} steps of the evaluation")
        assert told.endswith("no return; --max-steps allows more steps")
        assert last == '{"return_mean": null, "return_std": null, "episodes": 0}'


def test_more_steps_of_an_evaluation(tmp_path, capsys, monkeypatch):
    """Episodes longer than the bound: training and evaluation name the flag and a number with which they end."""
    monkeypatch.setattr("fastppo.analysis.evaluation.MIN_EPISODE_STEPS", 10)
    run_dir = str(tmp_path / "run")
    train(
        TrainConfig(env_id="Later-v0", num_envs=2, num_steps=4, num_iterations=1, eval_episodes=2, run_dir=run_dir, plain=True)
    )
    more = "; python -m fastppo.evaluate --max-steps 200 plays up to ten times as many\n"
    assert f"no return (1 a step){more}" in capsys.readouterr().out
    assert console([run_dir, "--episodes", "2"]) == 0
    assert more in capsys.readouterr().out
    assert console([run_dir, "--episodes", "2", "--max-steps", "200"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == {"return_mean": 40.0, "return_std": 0.0, "episodes": 2}
    assert "--max-steps" not in said


def test_a_video_of_what_does_not_end(tmp_path, capsys, monkeypatch):
    """It is as long as an episode may be, and the line says so."""
    monkeypatch.setattr("fastppo.analysis.evaluation.MIN_EPISODE_STEPS", 10)
    train(
        TrainConfig(
            env_id="Endless-v0", num_envs=2, num_steps=4, num_iterations=1, eval_episodes=0, run_dir=str(tmp_path / "run")
        )
    )
    assert console([str(tmp_path / "run"), "--episodes", "1", "--video", "gif"]) == 0
    assert "return 11 in 11 steps, where it is cut off" in capsys.readouterr().out


class Still:
    """A policy that always takes action 0."""

    def seed(self, seed):
        pass

    def reset(self, done=None):
        pass

    def act(self, obs, deterministic, mask):
        return np.zeros(len(obs), np.int64)


def test_some_episodes_end():
    """The mean is over those, and a line says how many there are."""
    envs = AutoresetEnvs(SyncVectorEnv([lambda: Endless(ends=4), Endless]))
    played = play_episodes(Still(), envs, 4, seed=0, max_steps=40)
    envs.close()
    assert played.returns == [4.0]
    assert played.report == {"return_mean": 4.0, "return_std": 0.0, "episodes": 1}
    assert played.remark.startswith(f"only 1 of 4 episodes ended in the {played.steps} steps of the evaluation: ")
    assert played.remark.endswith(f"--max-steps {10 * played.steps} plays up to ten times as many")
    assert 40 <= played.steps <= 41
    assert played.reward == played.steps
