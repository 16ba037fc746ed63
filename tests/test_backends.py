"""Every engine keeps one contract: shapes, seeds, what follows an end, true scores; Atari as others preprocess and count it.

Returned arrays need not outlive the next step (gymnasium's may be views of one buffer): the rollout copies them at once. So
does `played` below.
"""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo import TrainConfig, UsageError, train
from fastppo.envs.atari import FIRE, NO_FIRE, NOOP, AtariSettings, EpisodicLife
from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.envpool import EnvPoolVectorEnv, RawPool, make_envpool, task_of
from fastppo.envs.factory import EnvConfig, choose_vectorization, engine_name, make_envs
from fastppo.envs.registry import is_atari
from fastppo.train import console

N = 3
WHOLE_GAMES = AtariSettings(noop_max=0, episodic_life=False, fire_reset=False)

# id, --backend, --vectorization, --env-kwargs: episodes short enough to end
ENGINES = {
    "entry-point": ("CartPole-v1", "auto", "entry-point", {}),
    "sync": ("CartPole-v1", "auto", "sync", {"max_episode_steps": 12}),
    "grouped": ("CartPole-v1", "auto", "grouped", {"max_episode_steps": 12}),
    "async": ("CartPole-v1", "auto", "async", {}),
    "torch": ("CartPole-v1", "torch", "auto", {"max_episode_steps": 12}),
    "sync-pendulum": ("Pendulum-v1", "auto", "sync", {"max_episode_steps": 7}),
    "envpool-cartpole": ("CartPole-v1", "envpool", "auto", {}),
    "envpool-pendulum": ("Pendulum-v1", "envpool", "auto", {"max_episode_steps": 7}),
    "envpool-halfcheetah": ("HalfCheetah-v4", "envpool", "auto", {"max_episode_steps": 7}),
    "ale-breakout": ("ALE/Breakout-v5", "auto", "auto", {}),
    "ale-pong": ("PongNoFrameskip-v4", "auto", "auto", {"max_num_frames_per_episode": 80}),
    "envpool-breakout": ("ALE/Breakout-v5", "envpool", "auto", {}),
}


def make(engine, **settings):
    """N environments of one of ENGINES; skips where its package is missing."""
    env_id, backend, vectorization, env_kwargs = ENGINES[engine]
    for package in ("envpool", "ale"):
        if engine.startswith(package):
            pytest.importorskip({"ale": "ale_py"}.get(package, package))
    return make_envs(
        EnvConfig(
            env_id, N, vectorization, env_kwargs=env_kwargs, backend=backend, num_threads=2, atari=AtariSettings(**settings)
        )
    )


def numpy_of(batch):
    """A copy, whatever it was."""
    return np.array(batch.numpy() if is_tensor(batch) else batch)


def played(envs, actions, seed=5):
    """What N environments tell over len(actions) steps: obs (T+1, N, ...), reward, terminated, truncated, game_over (T, N)."""
    obs, rows = [numpy_of(envs.reset(seed=seed)[0])], []
    for action in actions:
        step = envs.step(action)
        obs.append(numpy_of(step[0]))
        rows.append([numpy_of(column) for column in step[1:4]] + [getattr(envs, "game_over", np.zeros(N, bool))])
    return np.stack(obs), *(np.stack(column) for column in zip(*rows, strict=True))


def some_actions(envs, steps, seed=0):
    """(T, N, ...) uniform random actions."""
    envs.action_space.seed(seed)
    return np.stack([envs.action_space.sample() for _ in range(steps)])


@pytest.mark.parametrize("engine", ENGINES)
def test_the_contract(engine):
    """Shapes and dtypes are the space's; a seed makes a trajectory, in another copy too; the row after an end pays 0, is no

    end, and does not heed its action; rewards and ends are finite numbers and booleans of every environment.
    """
    envs, copy = make(engine), make(engine)
    assert envs.num_envs == N
    assert AutoresetEnvs(envs).mode is AutoresetMode.NEXT_STEP
    space = envs.single_observation_space
    actions = some_actions(envs, 150 if "breakout" in engine else 60)
    obs, reward, terminated, truncated, _ = first = played(envs, actions)
    assert obs.shape[1:] == (N, *space.shape)
    assert obs.dtype == space.dtype
    assert reward.shape == terminated.shape == truncated.shape == (len(actions), N)
    assert terminated.dtype == truncated.dtype == np.bool_
    assert np.isfinite(reward).all()

    done = terminated | truncated
    assert done.any(axis=0).all()
    after = np.zeros_like(done)
    after[1:] = done[:-1]
    assert (reward[after] == 0).all()
    assert not (done & after).any()

    other = some_actions(envs, len(actions), seed=1)
    mixed = actions.copy()
    mixed[after] = other[after]
    assert (mixed != actions).any()
    for again in (played(copy, mixed), played(copy, mixed)):
        for mine, theirs in zip(first, again, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    alike = np.repeat(actions[:, :1], N, axis=1)
    first, second = (played(copy, alike, seed)[0] for seed in (5, 6))
    assert (first[:, 0] != first[:, 1]).any()  # environments that are all alike would be one
    assert (first != second).any()
    envs.close()
    copy.close()


@pytest.mark.parametrize("engine", ["entry-point", "sync", "grouped", "async", "torch", "envpool-cartpole"])
def test_cartpole_returns_its_lengths(engine):
    """Each step of an episode pays 1, the first and the last too, and an episode begins near the upright."""
    envs = make(engine)
    obs, reward, terminated, truncated, _ = played(envs, some_actions(envs, 80))
    done = terminated | truncated
    resetting = np.zeros_like(done)
    resetting[1:] = done[:-1]
    np.testing.assert_array_equal(reward, ~resetting)
    assert (np.abs(obs[1:][resetting]) <= 0.05).all()
    envs.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v4"])
def test_envpool_tells_a_time_limit_as_truncation(env_id):
    """At the step that gymnasium's TimeLimit cuts, and not as a termination; a fallen pole is told as one."""
    pytest.importorskip("envpool")
    envs = make_envs(EnvConfig(env_id, N, env_kwargs={"max_episode_steps": 6}, backend="envpool"))
    _, _, terminated, truncated, _ = played(envs, some_actions(envs, 20))
    expected = [step % 7 == 5 for step in range(20)]  # 6 steps and a resetting row
    assert truncated.tolist() == [[cut] * N for cut in expected]
    assert not terminated.any()
    envs.close()
    envs = make_envs(EnvConfig("CartPole-v1", N, backend="envpool"))
    obs, _, terminated, truncated, _ = played(envs, np.ones((30, N), np.int64))
    assert terminated.any()
    assert not truncated.any()
    assert (np.abs(obs[1:][terminated][:, 2]) > 0.2).all()
    envs.close()


def test_envpool_is_seeded_by_reset():
    """Oracle: a pool that was made with the seed. Without one the random numbers go on."""
    envpool = pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("Pendulum-v1", N, backend="envpool"))
    unseeded = envs.reset()[0]
    mine = [envs.reset(seed=11)[0], envs.reset()[0]]
    pool = envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=N, seed=11)
    np.testing.assert_array_equal(mine, [pool.reset()[0], pool.reset()[0]])
    assert (mine[0] != mine[1]).all()
    assert (mine[0] != unseeded).all()
    other = make_envs(EnvConfig("Pendulum-v1", N, backend="envpool"))
    assert (other.reset()[0] != unseeded).all()
    envs.close()
    other.close()


@pytest.mark.parametrize("task", ["CartPole-v1", "HalfCheetah-v4", "Breakout-v5", "Pendulum-v1"])
def test_envpools_own_step_is_not_missed(task):
    """Its two functions in C++ give what its step gives, infos included, over ends of episodes; float32 actions too."""
    pytest.importorskip("envpool")
    ours, theirs = (EnvPoolVectorEnv(task, N, max_episode_steps=40) for _ in range(2))
    for envs in (ours, theirs):
        envs.reset(seed=3)
    assert ours._raw is not None
    theirs._raw = None
    ours.action_space.seed(0)
    ends = 0
    for _ in range(100):
        action = ours.action_space.sample()
        action = action.astype(np.float32) if action.dtype == np.float64 else action
        (*got, info), (*expected, other) = ours.step(action), theirs.step(action)
        for one, two in zip(got, expected, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        assert info.pop("players").keys() == other.pop("players").keys()
        assert info.keys() == other.keys()
        for name in info:
            np.testing.assert_array_equal(info[name], other[name])
        ends += int((got[2] | got[3]).sum())
    assert ends >= N
    with pytest.raises(ValueError, match="shape"):
        ours.step(action[:2])
    for envs in (ours, theirs):
        envs.close()


@pytest.mark.parametrize("lacks", ["_recv", "obs", "action", "flat infos"])
def test_an_envpool_of_another_make_is_stepped_as_it_asks(lacks):
    """Nothing inside it is called that is not as expected."""
    keys = ["obs", "reward", "done", "trunc", "elapsed_step", "info:players.env_id", "info:lives"]
    keys += ["info:of.a.tree"] if lacks == "flat infos" else []
    spec = SimpleNamespace(_action_keys=["env_id", "players.env_id", "action.left" if lacks == "action" else "action"])
    pool = SimpleNamespace(_spec=spec, spec=spec, _send=print, _recv=print, _state_keys=keys)
    spec.action_array_spec = {"action": SimpleNamespace(dtype=np.float32, shape=[-1, 2])}
    assert RawPool.of(pool, N) is not None or lacks in ("action", "flat infos")
    if lacks == "_recv":
        del pool._recv
    elif lacks == "obs":
        keys[0] = "obs:left"
    assert RawPool.of(pool, N) is None


@pytest.mark.parametrize(
    ("num_envs", "cores", "allowed", "tied"),
    [(8, 2, {0, 1}, True), (2, 2, {0, 1}, True), (8, 16, set(range(16)), False), (8, 4, {0, 1}, False)],
)
def test_envpools_threads_are_tied_where_each_core_has_one(num_envs, cores, allowed, tied, monkeypatch):
    """Not where other runs would be tied to the same cores; what the user says goes before."""
    pytest.importorskip("envpool")
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr("fastppo.system.cpus.cpu_quota", lambda root: 99.0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for own, offset in (({}, 0 if tied else -1), ({"thread_affinity_offset": 1}, 1)):
        envs = make_envpool("CartPole-v1", num_envs, own, AtariSettings())
        assert envs.config.thread_affinity_offset == offset
        envs.close()


# --- Atari


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


# --- what is chosen, and what is refused


def test_settings_come_from_the_flags():
    """The flags' defaults are the literature's, and each reaches its setting."""
    assert TrainConfig().env_config.atari == AtariSettings()
    changed = AtariSettings(7, 2, 50, False, 3, 0.25, False, False, True)
    flags = {
        name if name in ("episodic_life", "fire_reset") else f"atari_{name}": value for name, value in vars(changed).items()
    }
    assert TrainConfig(**flags).env_config.atari == changed


def test_who_runs_what():
    """ALE's games run in ALE's own vector environment, without a trial; the names that logs and summaries show."""
    pytest.importorskip("ale_py")
    assert choose_vectorization(EnvConfig("ALE/Pong-v5", 8))[:2] == ("entry-point", "ALE's own vector environment")
    assert choose_vectorization(EnvConfig("PongNoFrameskip-v4", 8))[:2] == ("entry-point", "ALE's own vector environment")
    names = {
        "entry-point": "gymnasium/entry-point",
        "sync": "gymnasium/sync",
        "torch": "torch",
        "ale-pong": "ale",
        "envpool-cartpole": "envpool",
        "envpool-breakout": "envpool",
    }
    for engine, name in names.items():
        env_id, backend, vectorization, _ = ENGINES[engine]
        envs = make(engine)
        assert engine_name(envs, EnvConfig(env_id, backend=backend, vectorization=vectorization)) == name
        envs.close()


@pytest.mark.parametrize(
    ("env_id", "atari"),
    [
        ("ALE/Pong-v5", True),
        ("ale_py:ALE/Pong-v5", True),
        ("MsPacmanNoFrameskip-v4", True),
        ("ale_py:Pong-v4", True),
        ("CartPole-v1", False),
        ("Nonsense-v0", False),
        ("ALE/Nonsense-v5", False),
        ("environments:WalkVector-v0", False),
    ],
)
def test_what_is_atari(env_id, atari):
    """By what the id's registration says, module or not; nothing else is."""
    pytest.importorskip("ale_py")
    assert is_atari(env_id) is atari


def test_choosing_costs_no_torch():
    """A wrong flag answers at once: whether an id is Atari, and what is chosen for it, is known without torch."""
    pytest.importorskip("ale_py")
    code = (
        "import sys; from fastppo.envs.factory import EnvConfig, choose_vectorization; import fastppo.envs.envpool; "
        "choose_vectorization(EnvConfig('ALE/Pong-v5', 8)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("env_id", "task"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("Breakout-v5", "Breakout-v5"),
        ("ALE/MsPacman-v5", "MsPacman-v5"),
        ("ale_py:ALE/Breakout-v5", "Breakout-v5"),
        ("BreakoutNoFrameskip-v4", "Breakout-v5"),
        ("ALE/TicTacToe3D-v5", "TicTacToe3d-v5"),
    ],
)
def test_envpools_names(env_id, task):
    """Gymnasium's ids of a game are understood."""
    pytest.importorskip("envpool")
    assert task_of(env_id) == task


@pytest.mark.parametrize(
    ("env_id", "backend", "vectorization", "env_kwargs", "message"),
    [
        ("CartPoel-v1", "envpool", "auto", {}, r"--env-id 'CartPoel-v1': EnvPool has no CartPoel-v1; nearest: .*CartPole-v1"),
        ("ALE/Braekout-v5", "envpool", "auto", {}, r"nearest: .*Breakout-v5"),
        ("ALE/Braekout-v5", "auto", "auto", {}, r"--env-id 'ALE/Braekout-v5'.*nearest: .*ALE/Breakout-v5"),
        ("CartPole-v1", "envpool", "auto", {"gravity": 1}, r"--env-kwargs do not fit CartPole-v1 of EnvPool: .*gravity"),
        ("CartPole-v1", "envpool", "auto", {"num_threads": "x"}, "--env-kwargs do not fit CartPole-v1 of EnvPool"),
        ("CartPole-v1", "envpool", "auto", {"seed": 3}, "--env-kwargs seed is not for CartPole-v1.*--seed"),
        ("ALE/Pong-v5", "envpool", "auto", {"frame_skip": 3}, "--env-kwargs frame_skip is not for ALE/Pong-v5.*--atari"),
        ("ALE/Pong-v5", "auto", "auto", {"frameskip": 3}, "--env-kwargs frameskip is not for ALE/Pong-v5.*--atari"),
        ("ALE/Pong-v5", "auto", "auto", {"gravity": 3}, "--env-kwargs do not fit ALE/Pong-v5: .*gravity"),
        ("ALE/Pong-v5", "auto", "sync", {}, "--vectorization sync is not for ALE/Pong-v5.*leave it at auto"),
        ("ALE/Pong-v5", "gymnasium", "async", {}, "--vectorization async is not for ALE/Pong-v5.*leave it at auto"),
        ("ALE/Pong-v5", "gymnasium", "grouped", {}, "--vectorization grouped is not for ALE/Pong-v5.*leave it at auto"),
        ("Go9x9-v1", "envpool", "auto", {}, "--env-id Go9x9-v1: EnvPool's Go9x9-v1 is a game of 2 players"),
    ],
)
def test_what_is_refused(env_id, backend, vectorization, env_kwargs, message):
    """One line that names the flag and what would be right."""
    pytest.importorskip("envpool")
    pytest.importorskip("ale_py")
    with pytest.raises(UsageError, match=message):
        make_envs(EnvConfig(env_id, N, vectorization, env_kwargs=env_kwargs, backend=backend))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "envpool", "vectorization": "sync"}, "--vectorization sync is for --backend gymnasium; envpool"),
        ({"backend": "nonsense"}, "--backend must be one of auto, gymnasium, torch, envpool"),
        ({"atari_noop_max": -1}, "--atari-noop-max must be a whole number of at least 0"),
        ({"atari_frame_skip": 0}, "--atari-frame-skip must be a whole number of at least 1"),
        ({"atari_screen_size": 0}, "--atari-screen-size"),
        ({"atari_frame_stack": 0}, "--atari-frame-stack"),
        ({"atari_sticky_actions": 1.1}, "--atari-sticky-actions must be between 0 and 1"),
    ],
)
def test_bounds(settings, message):
    """A setting that cannot be is refused by its flag's name."""
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("env_id", "backend", "missing", "extra"),
    [
        ("HalfCheetah-v5", "auto", "gymnasium", "mujoco"),
        ("LunarLander-v3", "auto", "gymnasium", "box2d"),
        ("ALE/Breakout-v5", "auto", "ale_py", "atari"),
        ("BreakoutNoFrameskip-v4", "auto", "ale_py", "atari"),
        ("Breakout-v5", "envpool", "envpool", "envpool"),
    ],
)
def test_what_is_not_installed(monkeypatch, env_id, backend, missing, extra):
    """The message is the command that installs it."""

    def fail(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("something is missing")

    if missing == "gymnasium":
        monkeypatch.setattr(gym, "make", fail)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(gym.registry, env_id, raising=False)
    with pytest.raises(UsageError, match=rf"not installed: pip install 'fastppo\[{extra}\]'"):
        make_envs(EnvConfig(env_id, N, "sync" if missing == "gymnasium" else "auto", backend=backend))


def test_the_command_line_asks_who_runs_it(tmp_path, capsys):
    """A wrong id is looked for in EnvPool's list, not in gymnasium's, before anything is written; a right one trains."""
    pytest.importorskip("envpool")
    common = ["--backend", "envpool", "--run-dir", str(tmp_path / "run"), "--env-id"]
    assert console([*common, "Braekout-v5"]) == 2
    assert "EnvPool has no Braekout-v5; nearest: Breakout-v5" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    few = ["--num-iterations", "1", "--num-steps", "8", "--eval-episodes", "0", "--compile", "off"]
    assert console([*common, "CartPole-v1", *few]) == 0
    assert ": 8 environments, envpool (as --backend envpool asks)" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_on_envpool(tmp_path, env_id):
    """The whole trainer, evaluation included, and the same seed gives the same numbers."""
    pytest.importorskip("envpool")
    settings = {"env_id": env_id, "backend": "envpool", "num_envs": 4, "num_steps": 32, "num_iterations": 3, "compile": "off"}
    runs = [train(TrainConfig(**settings, eval_episodes=4, run_dir=str(tmp_path / name))) for name in ("a", "b")]
    summaries = [run.summary for run in runs]
    assert summaries[0]["backend"] == "envpool"
    assert summaries[0]["eval_return_mean"] == summaries[1]["eval_return_mean"]
    assert (runs[0].policy.params == runs[1].policy.params).all()
