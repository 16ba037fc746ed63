"""Atari games of both packages: preprocessing, lives, rewards and sticky actions against gymnasium's and the plain game."""

from dataclasses import replace
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.envs.atari import FIRE, NO_FIRE, NOOP, AtariSettings, EpisodicLife
from fastppo.envs.factory import EnvConfig, make_envs
from support.backends import WHOLE_GAMES, N, played, some_actions


def preprocessed(env_id, noop_max, actions, **settings):
    """gymnasium's AtariPreprocessing under the same actions: (T+1, H, W[, 3]), rewards, and whether the game was over."""
    env = gym.wrappers.AtariPreprocessing(gym.make(env_id), noop_max=noop_max, frame_skip=4, **settings)
    obs, rewards, ends = [env.reset(seed=0)[0]], [], []
    for action in actions:
        if ends and ends[-1]:
            obs.append(env.reset()[0])
            rewards.append(0.0)
            ends.append(False)
            continue
        screen, reward, terminated, _, _ = env.step(action)
        obs.append(screen)
        rewards.append(float(reward))
        ends.append(terminated)
    env.close()
    return np.stack(obs), rewards, ends


@pytest.mark.parametrize("backend", ["auto", "envpool"])
@pytest.mark.parametrize(("game", "colour"), [("Breakout", False), ("Breakout", True), ("Pong", False)])
@pytest.mark.long
def test_screens_are_those_of_gymnasiums_preprocessing(game, backend, colour):
    """Held actions, the maximum of two frames, luminance or colour, size, and the newest screen last in the stack."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    if backend == "envpool":
        pytest.importorskip("envpool")
    settings = replace(WHOLE_GAMES, grayscale=not colour)
    envs = make_envs(EnvConfig(f"ALE/{game}-v5", N, backend=backend, atari=settings))
    actions = np.random.default_rng(3).integers(0, envs.single_action_space.n, 40)
    obs, reward, *_ = played(envs, np.repeat(actions[:, None], N, axis=1))
    envs.close()
    noops = 1 if backend == "envpool" else 0  # EnvPool plays one at least
    expected, expected_reward, _ = preprocessed(f"{game}NoFrameskip-v4", noops, actions, grayscale_obs=not colour)
    assert reward[:, 0].tolist() == expected_reward
    if not colour:
        expected = expected[..., None]
    stacked = np.concatenate([expected[start : start + 38] for start in range(4)], axis=-1).transpose(0, 3, 1, 2)
    assert obs[3:, 0].shape == stacked.shape
    difference = np.abs(obs[3:, 0].astype(int) - stacked)
    assert difference.max() <= 1, difference.max()
    assert np.unique(stacked[-1], axis=0).shape[0] > 1  # the screens of a stack differ, or their order was not compared


@pytest.mark.parametrize("backend", ["auto", "envpool"])
@pytest.mark.long
def test_scores_and_ends_are_those_of_the_plain_game(backend):
    """Oracle: one Breakout of gymnasium's, frame by frame, given the actions that count: four lives told as ends and then

    the game's, rewards unclipped, their sum between two game ends the game's score.
    """
    pytest.importorskip("ale_py")
    if backend == "envpool":
        pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("ALE/Breakout-v5", N, backend=backend, atari=AtariSettings(noop_max=1)))
    actions = some_actions(envs, 700, seed=2)
    _, reward, terminated, truncated, game_over = played(envs, actions)
    envs.close()
    assert not truncated.any()
    assert not (game_over & ~terminated).any()

    plain = gym.make("BreakoutNoFrameskip-v4")
    plain.reset(seed=0)
    plain.step(FIRE)
    scores, score, ends = [], 0.0, []
    for step, action in enumerate(actions[:, 0]):
        if step and game_over[step - 1, 0]:
            plain.reset()
            plain.step(FIRE)
            continue
        if step and terminated[step - 1, 0]:
            action = FIRE
        over = False
        for _ in range(4):
            if not over:
                _, paid, over, _, info = plain.step(action)
                score += paid
        ends.append((step, info["lives"]))
        if over:
            scores.append(score)
            score = 0.0
        assert over == game_over[step, 0]
    plain.close()

    lives = [(after, step) for (_, before), (step, after) in pairwise(ends) if after < before]
    assert [step for _, step in lives] == np.flatnonzero(terminated[:, 0]).tolist()
    told = np.add.reduceat(reward[:, 0], [0, *(np.flatnonzero(game_over[:, 0]) + 1)])[: len(scores)]
    assert told.tolist() == scores
    assert len(scores) >= 2
    assert terminated[:, 0].sum() >= 5 * len(scores)
    assert max(scores) > 0


@pytest.mark.parametrize("backend", ["auto", "envpool"])
def test_rewards_are_not_clipped(backend):
    """Rewards are not clipped: an invader pays 5 and more."""
    pytest.importorskip("ale_py")
    if backend == "envpool":
        pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("ALE/SpaceInvaders-v5", N, backend=backend))
    reward = played(envs, some_actions(envs, 150))[1]
    assert reward.max() >= 5
    envs.close()


@pytest.mark.parametrize("backend", ["auto", "envpool"])
@pytest.mark.parametrize("fire_reset", [True, False])
def test_fire_starts_every_life(backend, fire_reset):
    """A player who never presses FIRE loses all five balls; without fire_reset the first is never served."""
    pytest.importorskip("ale_py")
    if backend == "envpool":
        pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("ALE/Breakout-v5", N, backend=backend, atari=AtariSettings(fire_reset=fire_reset)))
    _, _, terminated, _, game_over = played(envs, np.full((160, N), NOOP))
    assert (terminated.sum(axis=0) >= 5).all() == fire_reset
    assert game_over.any() == fire_reset
    envs.close()


@pytest.mark.parametrize("backend", ["auto", "envpool"])
def test_whole_games_where_lives_end_nothing(backend):
    """Without episodic_life an end is a game's."""
    pytest.importorskip("ale_py")
    if backend == "envpool":
        pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("ALE/Breakout-v5", N, backend=backend, atari=AtariSettings(episodic_life=False)))
    envs.reset(seed=0)
    envs.action_space.seed(0)
    ends = 0
    for _ in range(300):
        _, _, terminated, _, info = envs.step(envs.action_space.sample())
        assert (info["lives"][terminated] == 0).all()
        ends += int(terminated.sum())
    assert ends > 0
    envs.close()


@pytest.mark.parametrize("backend", ["auto", "envpool"])
@pytest.mark.long
def test_sticky_actions_are_the_flags(backend):
    """Not the 0.25 of the id: without them the same actions are the same game whatever the seed, with them they are not."""
    pytest.importorskip("ale_py")
    if backend == "envpool":
        pytest.importorskip("envpool")
    games = {}
    for sticky in (0.0, 0.25):
        settings = replace(WHOLE_GAMES, sticky_actions=sticky)
        envs = make_envs(EnvConfig("ALE/Pong-v5", N, backend=backend, atari=settings))
        actions = np.repeat(some_actions(envs, 60)[:, :1], N, axis=1)
        games[sticky] = [played(envs, actions, seed)[0] for seed in (1, 2)]
        envs.close()
    assert (games[0.0][0] == games[0.0][1]).all()
    assert (games[0.25][0] != games[0.25][1]).any()


def test_other_settings_arrive():
    """Size, stack, frames held and actions, in both engines; ALE's time limit counts frames, EnvPool's steps."""
    pytest.importorskip("ale_py")
    pytest.importorskip("envpool")
    settings = AtariSettings(frame_skip=2, screen_size=50, frame_stack=3, full_action_space=True, fire_reset=False)
    for backend in ("auto", "envpool"):
        envs = make_envs(EnvConfig("ALE/Breakout-v5", N, backend=backend, atari=settings))
        assert envs.single_observation_space.shape == (3, 50, 50)
        assert envs.single_action_space.n == 18
        envs.reset(seed=0)
        before = envs.step(np.zeros(N, np.int64))[4]
        after = envs.step(np.zeros(N, np.int64))[4]
        if backend == "auto":
            assert (after["frame_number"] - before["frame_number"] == 2).all()
        else:
            assert envs.unwrapped.config.max_episode_steps == 54_000
            assert envs.unwrapped.config.frame_skip == 2
        envs.close()


@pytest.mark.slow
def test_which_games_have_fire():
    """Oracle: the action sets of ALE. EnvPool does not tell its own."""
    ale_py = pytest.importorskip("ale_py")
    found = set()
    ale = ale_py.ALEInterface()
    ale.setLoggerMode(ale_py.LoggerMode.Error)
    gym.register_envs(ale_py)
    for env_id in (env_id for env_id in gym.registry if env_id.startswith("ALE/")):
        game = gym.spec(env_id).kwargs["game"]
        ale.loadROM(ale_py.roms.get_rom_path(game))
        if ale.getMinimalActionSet()[FIRE].name != "FIRE":
            found.add(game)
    assert found == NO_FIRE


class ScriptedGame(VectorEnv):
    """One game that does what a list of rows (lives, reward, terminated, truncated) says, and keeps the actions it is given."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, lives, rows):
        self.num_envs = 1
        self.single_action_space = gym.spaces.Discrete(4)
        self.lives, self.rows, self.received = lives, iter(rows), []

    def reset(self, *, seed=None, options=None):
        return np.zeros((1, 1)), {"lives": np.array([self.lives])}

    def step(self, actions):
        self.received.append(int(actions[0]))
        lives, reward, terminated, truncated = next(self.rows)
        info = {"lives": np.array([lives])}
        return np.zeros((1, 1)), np.array([reward]), np.array([terminated]), np.array([truncated]), info


@pytest.mark.parametrize(
    ("lives", "rows", "told"),
    [
        pytest.param(  # told: (action received, reward, terminated, truncated, game_over)
            2,
            [(2, 1, False, False), (1, 2, False, False), (1, 5, False, False), (1, 3, False, False)],
            [(3, 1, False, False, False), (3, 2, True, False, False), (1, 0, False, False, False), (3, 8, False, False, False)],
            id="what a resetting row pays comes one row later",
        ),
        pytest.param(
            2,
            [(1, 0, False, False), (0, 5, True, False), (2, 0, False, False), (2, 7, False, False), (1, 0, False, False)],
            [
                (3, 0, True, False, False),
                (1, 0, False, False, False),
                (3, 5, True, False, True),
                (1, 0, False, False, False),
                (3, 7, True, False, False),
            ],
            id="a game that ends in a resetting row",
        ),
        pytest.param(
            1,
            [(0, 1, False, False), (0, 2, False, False), (0, 0, True, False), (1, 0, False, False), (1, 4, False, False)],
            [
                (3, 1, False, False, False),
                (3, 2, False, False, False),
                (3, 0, True, False, True),
                (3, 0, False, False, False),
                (3, 4, False, False, False),
            ],
            id="no lives left is no life lost",
        ),
        pytest.param(
            3,
            [(4, 0, False, False), (4, 1, False, True), (3, 0, False, False), (3, 1, False, False)],
            [(3, 0, False, False, False), (3, 1, False, True, True), (3, 0, False, False, False), (3, 1, False, False, False)],
            id="a new game with fewer lives than the last had",
        ),
        pytest.param(
            3,
            [(2, 0, False, False), (1, 0, False, False), (1, 0, False, False)],
            [(3, 0, True, False, False), (1, 0, False, False, False), (3, 0, False, False, False)],
            id="a life lost in a resetting row ends nothing",
        ),
    ],
)
def test_lives_by_hand(lives, rows, told):
    """The rule of `EpisodicLife` on games written down here; the agent always plays action 3, a new life begins with 1."""
    game = ScriptedGame(lives, rows)
    envs = EpisodicLife(game, FIRE)
    envs.reset()
    found = []
    for _ in rows:
        _, reward, terminated, truncated, _ = envs.step(np.array([3]))
        columns = (reward, terminated, truncated, envs.game_over)
        found.append((game.received[-1], *(column.item() for column in columns)))
    assert found == told
