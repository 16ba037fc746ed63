"""Rewards that are vectors: --reward-weights trains on their weighted sum, and each part's return is logged."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import train
from fastppo.__main__ import console
from fastppo.envs.preprocessing import Preprocessing
from fastppo.envs.wrappers import wrapped
from fastppo.errors import UsageError
from fastppo.run.episodes import EpisodeStatistics
from fastppo.run.metrics import METRICS
from fastppo.run.metrics_file import read_rows
from support.runs import tiny


class TwoParts(gym.Env):
    """Episodes of 4 steps. Action 0 pays 1 for part 0, action 1 pays 2 for part 1; each step costs 0.5 of part 2."""

    observation_space = Box(-1.0, 1.0, (2,))
    action_space = Discrete(2)

    def __init__(self, told=True, listed=False):
        self.listed = listed
        if told:  # as mo-gymnasium's environments do
            self.reward_space = Box(-10.0, 10.0, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.elapsed += 1
        reward = [float(action == 0), 2.0 * (action == 1), -0.5]
        reward = reward if self.listed else np.array(reward, np.float32)
        return np.zeros(2, np.float32), reward, self.elapsed == 4, False, {"own": 1}


gym.register("TwoParts-v0", entry_point=TwoParts)
SETTINGS = {"env_id": "TwoParts-v0", "reward_weights": (1.0, 0.25, -2.0)}


@pytest.mark.parametrize("listed", [False, True])
def test_the_weighted_sum(listed):
    """1 * 1 + 0.25 * 0 - 2 * -0.5 = 2, and 0.5 + 1 = 1.5; frame skip adds the parts up first."""
    env = wrapped(TwoParts(listed=listed), Preprocessing(reward_weights=(1.0, 0.25, -2.0)))
    env.reset()
    (_, first, *_), (_, second, *_, info) = env.step(0), env.step(1)
    assert (first, second) == (2.0, 1.5)
    assert info["own"] == 1
    skipping = wrapped(TwoParts(listed=listed), Preprocessing(reward_weights=(1.0, 0.25, -2.0), frame_skip=3))
    skipping.reset()
    assert [skipping.step(0)[1], skipping.step(1)[1]] == [6.0, 1.5]  # three steps, then the one that is left


def test_returns_of_parts_by_hand():
    """Two environments, an episode over the cut of two rollouts, a row that only resets; through a checkpoint between them."""
    statistics = EpisodeStatistics(2, 2)
    assert all(map(math.isnan, statistics.part_means))
    yes, no = True, False
    parts = np.array([[[1.0, 10.0], [2.0, 20.0], [100.0, 30.0]], [[-1.0, 0.0], [-2.0, 0.5], [100.0, 0.0]]])
    done, valid = np.array([[no, no], [yes, no], [no, no]]), np.array([[yes, yes], [yes, yes], [no, yes]])
    statistics.update(parts[0], done, valid, parts)
    assert statistics.part_means == [3.0, -3.0]
    after = EpisodeStatistics(2, 2)
    after.load_state_dict(statistics.state_dict())
    last = np.array([[[5.0, 40.0]], [[0.0, 1.0]]])
    after.update(last[0], np.array([[yes, yes]]), np.array([[yes, yes]]), last)
    assert [list(returns) for returns in after.parts] == [[3.0, 5.0, 100.0], [-3.0, 0.0, 1.5]]
    with pytest.raises(ValueError, match="returns of 2 parts of the reward, not 3"):
        EpisodeStatistics(2, 3).load_state_dict(statistics.state_dict())
    after.update(last[0], np.array([[no, no]]), np.array([[yes, yes]]), last)
    after.forget_running()
    after.update(last[0], np.array([[yes, no]]), np.array([[yes, yes]]), last)
    assert [list(returns)[-1] for returns in after.parts] == [5.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [{"vectorization": "sync"}, {"vectorization": "grouped", "num_threads": 2}, {"num_seeds": 2}, {"frame_skip": 2}],
    ids=str,
)
def test_each_part_is_logged(settings, tmp_path):
    """Columns after the others, in TensorBoard too: their weighted sum is the return, and part 2 is -0.5 a step."""
    result = train(tiny(tmp_path / "run", **SETTINGS, **settings, eval_episodes=2))
    place = tmp_path / "run" / ("seed-2" if "num_seeds" in settings else "")
    rows = read_rows(place / "metrics.csv")
    assert [name for name in rows[-1] if name not in METRICS] == ["episodic_return_0", "episodic_return_1", "episodic_return_2"]
    for row in rows:
        parts = [float(row[f"episodic_return_{index}"]) for index in range(3)]
        assert float(row["episodic_return_mean"]) == pytest.approx(np.dot(parts, SETTINGS["reward_weights"]))
        assert parts[2] == -2.0
        assert parts[0] + parts[1] / 2.0 == pytest.approx(4.0)
    events = EventAccumulator(str(place)).Reload()
    assert events.Scalars("charts/episodic_return_2")[-1].value == -2.0
    summary = (result.seeds[1] if "num_seeds" in settings else result).summary
    assert summary["eval_return_parts"][2] == -2.0
    assert summary["eval_return_mean"] == pytest.approx(np.dot(summary["eval_return_parts"], SETTINGS["reward_weights"]))


def test_weights_decide_what_is_learned(tmp_path):
    """The action of the part that has the weight."""
    longer = {"env_id": "TwoParts-v0", "num_envs": 8, "num_iterations": 10, "learning_rate": 0.01}
    results = [train(tiny(tmp_path / str(w), **longer, reward_weights=w)) for w in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))]
    assert [int(result.policy.act(np.zeros(2, np.float32))) for result in results] == [0, 1]


def test_resume_goes_on_with_the_parts(tmp_path):
    """A run stopped and resumed at a checkpoint logs what an uninterrupted one logs."""
    settings = {**SETTINGS, "exact_resume": True, "checkpoint_iterations": 2, "num_steps": 6, "anneal_lr": False}
    train(tiny(tmp_path / "whole", **settings))
    half = tiny(tmp_path / "half", **{**settings, "num_iterations": 2})
    train(half)
    train(tiny(tmp_path / "half", **settings, resume=str(tmp_path / "half")))
    whole, resumed = (
        [{k: v for k, v in row.items() if k.startswith("episodic")} for row in read_rows(tmp_path / name / "metrics.csv")]
        for name in ("whole", "half")
    )
    assert whole == resumed


def test_evaluate(tmp_path, capsys):
    """In the line and in the JSON."""
    flags = [
        "--num-envs",
        "2",
        "--num-steps",
        "16",
        "--num-iterations",
        "1",
        "--eval-episodes",
        "0",
        "--compile",
        "off",
        "--plain",
    ]
    flags += [
        "--env-id",
        "test_reward_weights:TwoParts-v0",
        "--run-dir",
        str(tmp_path / "run"),
        "--reward-weights",
        "1",
        "-0.5",
        "0",
    ]
    assert console(["train", *flags]) == 0
    capsys.readouterr()
    assert console(["evaluate", str(tmp_path / "run"), "--episodes", "3"]) == 0
    line, data = capsys.readouterr().out.splitlines()[-2:]
    assert line.endswith("part 2: -2.00")
    assert json.loads(data)["return_parts"][2] == -2.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "reward has shape (3,); it has to be a number: --reward-weights 1 1 1 trains on the sum of its parts"),
        (["--reward-weights", "1"], "--reward-weights takes a number for each of the 3 parts of the reward, got 1"),
        (["--reward-weights", "1", "2", "--env-kwargs", "told=false"], "each of the 3 parts of the reward, got 2"),
        (
            ["--reward-weights", "1", "--env-id", "environments:Walk-v0"],
            "--reward-weights: the reward is one number; leave it off",
        ),
        (["--reward-weights", "1", "nan", "2"], "--reward-weights must be one or more numbers, got (1.0, nan, 2.0)"),
        (
            ["--reward-weights", "1", "--backend", "torch"],
            "--reward-weights wraps environments one by one, and --backend torch",
        ),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    """One line, exit code 2, nothing written; no suggestion that fails."""
    flags = ["--env-id", "test_reward_weights:TwoParts-v0", *flags, "--run-dir", str(tmp_path / "run")]
    assert console(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "--no-check-env" not in line
    assert not (tmp_path / "run").exists()


def test_a_wrapper_that_weighs_already():
    """`reward_space` of the outermost wrapper counts, as in mo-gymnasium's LinearReward."""
    inner = gym.Wrapper(TwoParts())
    inner.reward_space = Box(-1.0, 1.0, (2,))
    with pytest.raises(UsageError, match="each of the 2 parts"):
        wrapped(inner, Preprocessing(reward_weights=(1.0,)))
