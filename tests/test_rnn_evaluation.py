"""Evaluation and videos of policies with a memory: each episode starts with an empty one."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import Cue
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import load_policy, train
from fastppo.analysis.evaluation import play_episodes
from fastppo.analysis.rendered_episodes import play
from fastppo.envs.atari import EpisodicLife
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
from fastppo.random_streams import Stream, environment_seed
from support.recurrent import SMALL
from support.runs import tiny

CUE = "environments:Cue-v0"


class Watched:
    """An agent that keeps what it saw, what it remembered then and what it did, of each environment: lists of (N, ...)."""

    def __init__(self, agent):
        self.agent = agent
        self.seed, self.reset = agent.seed, agent.reset
        self.obs, self.rnn_state = [], []

    def act(self, obs, deterministic=True, action_mask=None):
        self.obs.append(np.array(obs))
        action = self.agent.act(obs, deterministic, action_mask)
        self.rnn_state.append(self.agent.rnn_state.clone())
        return action


def played_alone(agent, env, episodes, seed):
    """Oracle: one environment, one episode after another, each with an agent that remembers nothing before it.

    Returns of each episode its return, and (steps, obs_size) and (steps, S) of what was seen and remembered.
    """
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=None if episode else seed)
        agent.reset()
        total, seen, remembered, ended = 0.0, [], [], False
        while not ended:
            action = agent.act(obs)
            seen.append(obs)
            remembered.append(agent.rnn_state[0].clone())
            obs, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + reward, terminated or truncated
        results.append((total, np.stack(seen), torch.stack(remembered)))
    return results


@pytest.fixture(scope="module", params=["lstm", "gru"])
def cue_run(request, tmp_path_factory):
    """A policy of two layers for episodes whose first observation says what to do in all of the others."""
    settings = {**SMALL, "rnn": request.param, "rnn_layers": 2, "env_id": CUE, "num_minibatches": 2, "num_iterations": 2}
    return train(tiny(tmp_path_factory.mktemp("cue") / "run", norm_obs=True, **settings)).run_dir


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_evaluation_remembers_one_episode(cue_run, mode):
    """Three environments whose episodes end at different steps: each is played, and remembered, as it would be alone.

    Under next-step autoreset the agent is shown the final observation once more, which it must not remember.
    """
    watched = Watched(load_policy(cue_run))
    watched.agent.act(np.ones((5, 2), np.float32))  # of other environments, which evaluation forgets
    envs = make_gymnasium_envs(EnvConfig("environments:CueVector-v0", 3, env_kwargs={"mode": mode}))
    returns = play_episodes(watched, AutoresetEnvs(envs), 12, seed=7).returns
    envs.close()
    assert watched.agent.rnn_state is None
    gap = 1 if mode == "NextStep" else 0
    expected, lengths = [], []
    for index in range(3):
        episodes = played_alone(
            load_policy(cue_run), gym.make(CUE), 4, seed=environment_seed(7, Stream.EVALUATION_ENVIRONMENTS) + index
        )
        start = 0
        for total, seen, remembered in episodes:
            expected.append(total)
            lengths.append(len(seen))
            rows = slice(start, start + len(seen))
            np.testing.assert_array_equal(np.stack([obs[index] for obs in watched.obs[rows]]), seen)
            torch.testing.assert_close(torch.stack([rnn_state[index] for rnn_state in watched.rnn_state[rows]]), remembered)
            start += len(seen) + gap
    assert returns == expected
    assert len(set(lengths)) > 3


class Lives(Cue):
    """Cue, three of whose episodes are the lives of one game; a picture that is all of one colour."""

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    number = 0

    def reset(self, *, seed=None, options=None):
        self.number = 1 if seed is not None else self.number + 1
        return super().reset(seed=seed)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated or truncated, False, info

    def render(self):
        return np.full((8, 8, 3), self.elapsed, np.uint8)


class Games(EpisodicLife):
    """Says of one `Lives` which ends are those of a game."""

    def __init__(self, mode):
        super().__init__(SyncVectorEnv([Lives], autoreset_mode=AutoresetMode(mode)), 0)

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        self.game_over = np.array([self.env.envs[0].number % 3 == 0])
        return self.env.step(actions)


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_what_is_drawn_remembers_one_life(cue_run, mode):
    """Two games of three lives for a video: each life is played, and remembered, as it would be alone."""
    watched = Watched(load_policy(cue_run))
    watched.agent.act(np.ones((1, 2), np.float32))  # of an episode before, which is forgotten
    envs = AutoresetEnvs(Games(mode))
    frames, totals = [], []
    for seed in (7, 8):
        total, steps = play(watched, envs, frames.append, seed, True, 1000)
        totals.append(total)
        assert len(frames) == steps + 1
        frames.clear()
    envs.close()
    expected = [life for seed in (7, 8) for life in played_alone(load_policy(cue_run), Lives(), 3, seed)]
    assert totals == pytest.approx([sum(life[0] for life in game) for game in (expected[:3], expected[3:])])
    start = 0
    for number, (_, seen, remembered) in enumerate(expected):
        rows = slice(start, start + len(seen))
        np.testing.assert_array_equal(np.concatenate(watched.obs[rows]), seen)
        torch.testing.assert_close(torch.cat(watched.rnn_state[rows]), remembered)
        # a life that another follows is shown its last observation once more; a game is reset
        start += len(seen) + (1 if mode == "NextStep" and number % 3 < 2 else 0)
    assert len(watched.obs) == start


@pytest.mark.slow  # of learning
def test_what_has_to_be_remembered_is_learned(tmp_path):
    """The first observation says which action pays until the end: with a memory nearly all steps are right, without half."""
    found = {}
    for kind in (None, "gru"):
        settings = {"num_envs": 16, "num_steps": 32, "num_iterations": 60, "learning_rate": 0.01, "update_epochs": 4}
        config = tiny(tmp_path / str(kind), env_id=CUE, rnn=kind, **SMALL, **settings, backend="gymnasium")
        envs = make_gymnasium_envs(EnvConfig("environments:CueVector-v0", 8))
        found[kind] = np.mean(play_episodes(train(config).policy, AutoresetEnvs(envs), 100, seed=3).returns)
        envs.close()
    assert found["gru"] > 0.95
    assert found[None] < 0.75
