"""benchmarks/memory.py: its environments by hand and against gymnasium's, and a run of seconds from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def memory(benchmark_script):
    """The script as a module; its environments are registered."""
    return benchmark_script


def test_an_episode_of_recall(memory):
    """Cue 1, blanks, the question at the second of a delay of 2, worth 1 if answered by 1, an early answer nothing."""
    recall = memory.Recall(delay=2, num_cues=3)
    state, obs = recall.reset(torch.tensor([[0.5, 0.9], [0.5, 0.9]]))
    assert obs.tolist() == [[0, 1, 0, 0]] * 2
    action = torch.tensor([1, 2])
    seen = []
    for _ in range(3):
        state, obs, reward, terminated, _ = recall.step(state, action, torch.zeros(2, 2))
        seen.append((obs[0].tolist(), reward.tolist(), terminated.tolist()))
    assert seen == [
        ([0, 0, 0, 0], [0, 0], [False, False]),
        ([0, 0, 0, 1], [0, 0], [False, False]),
        ([0, 0, 0, 0], [1, 0], [True, True]),
    ]


def test_delays_are_drawn_within_their_bounds(memory):
    """From min_delay to delay, both of which occur, as do all cues."""
    random = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    state, _ = memory.Recall(delay=5, min_delay=2).reset(random)
    assert state.left.unique().tolist() == [2, 3, 4, 5]
    assert state.cue.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.usefixtures("memory")
def test_the_plain_environment_is_one_of_many():
    """Whoever repeats the cue when asked has return 1 at every length, reset after reset."""
    env = gym.make("Recall-v0", delay=3)
    for seed in (0, 1, None):
        obs, _ = env.reset(seed=seed)
        cue, steps, ended = np.int64(obs.argmax()), 0, False
        while not ended:
            obs, reward, ended, _, _ = env.step(cue)
            steps += 1
        assert (steps, reward) == (4, 1.0)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("name", "kept"), [("CartPole", [0, 2]), ("Pendulum", [0, 1])])
def test_gymnasiums_environment_without_velocities(name, kept):
    """The same episode, its other numbers, its rewards and its end, to the time limit of Pendulum too."""
    full, hidden = gym.make(f"{name}-v1"), gym.make(f"{name}NoVel-v1")
    full.action_space.seed(0)
    obs, seen = full.reset(seed=3)[0], hidden.reset(seed=3)[0]
    ended = False
    while not ended:
        assert seen.tolist() == obs[kept].tolist()
        assert seen in hidden.observation_space
        action = full.action_space.sample()
        obs, *rest = full.step(action)
        seen, *others = hidden.step(action)
        assert rest == others
        ended = rest[1] or rest[2]


@pytest.mark.usefixtures("memory")
def test_gymnasiums_vector_cartpole_without_velocities():
    """Three at once for longer than an episode, autoreset included."""
    full, hidden = gym.make_vec("CartPole-v1", 3), gym.make_vec("CartPoleNoVel-v1", 3)
    obs, seen = full.reset(seed=3)[0], hidden.reset(seed=3)[0]
    num_ended = 0
    for _ in range(40):
        assert np.array_equal(seen, obs[:, [0, 2]])
        obs, *rest = full.step(np.array([0, 1, 1]))
        seen, *others = hidden.step(np.array([0, 1, 1]))
        assert all(np.array_equal(one, other) for one, other in zip(rest[:3], others[:3], strict=True))
        num_ended += int(rest[1].sum())
    assert num_ended >= 3
    assert hidden.single_observation_space.shape == (2,)


@pytest.mark.long
def test_a_run_from_end_to_end(tmp_path):
    """From another folder: the environments are found by their module, a row of the table each, the last line is JSON."""
    words = ["--task", "recall8", "--memories", "gru", "none", "--seeds", "1", "--eval-episodes", "4", "--jobs", "2"]
    flags = ["--num-envs", "4", "--num-steps", "32", "--total-timesteps", "100", "--compile", "off"]
    command = [sys.executable, str(SCRIPT), *words, "--", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    *_, last = done.stdout.splitlines()
    result = json.loads(last)
    assert [row["env_id"] for row in result["memories"]] == ["recall8, gru", "recall8, none"]
    assert all(0.0 <= row["evaluations"][0] <= 1.0 for row in result["memories"])
    assert result["failed"] == []
